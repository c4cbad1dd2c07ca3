"""Sources through a recipe's steps into shards of documents, by processes of this machine or by Ray.

A corpus is cut into units by position alone (`fastlm.data.sources.cut`), each unit becomes one shard, and a shard that
is there need not be made again. So the shards are the same for any number of workers, after any interruption.
"""

from .recipe import Recipe, StepSpec, load_recipe, recipes
from .shards import Shard, read_shard
from .stage import Job, make_shards

__all__ = ["Job", "Recipe", "Shard", "StepSpec", "load_recipe", "make_shards", "read_shard", "recipes"]
