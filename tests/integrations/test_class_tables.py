"""Swapped classes are found in tables of classes: quantization after fastlm.accelerate does what it does before it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastlm
import fastlm.nn
from fastlm.integrations import rules

E, FF, B, T = 32, 64, 2, 7
STANDING_IN = [(known, fast) for known, fast in (*rules.CLASSES.items(), (nn.Linear, fastlm.nn.Linear))]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated"),  # torch.ao.quantization's own
    pytest.mark.filterwarnings("ignore:.*kernel was not registered to the Autograd key"),
]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, FF, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.act, self.head = nn.LayerNorm(E), nn.GELU(), nn.Linear(E, 5)

    def forward(self, x):
        return self.head(self.act(self.norm(self.encoder(x))))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(E), nn.Linear(E, FF), nn.GELU(), nn.Linear(FF, E)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.norm(x))))


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=E, num_hidden_layers=1, num_attention_heads=2, intermediate_size=FF
    )
    return transformers.BertForMaskedLM(config).eval()


MODELS = {
    "torch": (Model, lambda: (torch.randn(B, T, E),)),
    "bert": (bert, lambda: (torch.arange(B * T).view(B, T),)),
}


def converted(model):
    return [name for name, m in model.named_modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]


@pytest.mark.parametrize("name", MODELS)
def test_quantize_dynamic_converts_every_linear_layer_and_they_run(name):
    make, inputs = MODELS[name]
    model, args = make(), inputs()
    stock = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    fastlm.accelerate(model)
    ours = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert converted(ours) == converted(stock) != []
    assert not converted(model)
    seen = []
    for part in converted(ours):
        ours.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    results = [m.train(model.training)(*args) for m in (model, stock, ours)]
    exact, by_torch, actual = (getattr(y, "logits", y).detach() for y in results)
    assert len(seen) == len(converted(ours))
    # Inputs are rounded to 8 bits, so that fp32's own rounding moves a few of them by a whole step.
    rounding = (by_torch - exact).abs().max()
    assert rounding > 0
    assert (actual - exact).abs().max() <= 1.5 * rounding
    state = copy.deepcopy(model).state_dict()
    assert list(state) == list(make().state_dict())


def test_graph_mode_quantization_takes_torchs_layers_whole():
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = Mlp().eval(), torch.randn(B, E)
    types = QConfigMapping().set_object_type(nn.Linear, default_dynamic_qconfig)
    stock = convert_fx(prepare_fx(copy.deepcopy(model), types, (x,)))
    fastlm.accelerate(model)
    ours = convert_fx(prepare_fx(copy.deepcopy(model), types, (x,)))
    assert converted(ours) == converted(stock) == ["fc1", "fc2"]
    torch.testing.assert_close(ours(x), stock(x), rtol=0.05, atol=0.05 * stock(x).abs().max().item())
    fastlm.restore(model)
    assert model.fc1.__module__ == nn.Linear.__module__
    assert "__module__" not in vars(model.fc1)


def test_weights_that_torchao_quantizes_are_the_ones_that_run():
    quantization = pytest.importorskip("torchao.quantization")
    stock = Model().train()
    ours = copy.deepcopy(stock)
    exact = stock(x := torch.randn(B, T, E)).detach()
    fastlm.accelerate(ours)
    for model in (stock, ours):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert type(model.encoder.layers[0].linear1.weight) is not nn.Parameter
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours(x), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("known", "fast"), STANDING_IN, ids=lambda cls: cls.__module__.partition(".")[0])
def test_a_table_finds_the_class_that_ours_stands_in_for(known, fast):
    assert {known: "found"}[fast] == {fast: "found"}[known] == "found"
    assert fast in [known]
    assert known in {fast}
    assert fast is not known
    assert issubclass(fast, known)
    assert not fast != known  # noqa: SIM202  (the other operator)


def test_every_class_that_accelerate_gives_equals_the_one_before():
    model = nn.ModuleList([Model(), Mlp()])
    before = {name: type(module) for name, module in model.named_modules()}
    rows = fastlm.accelerate(model).replaced
    assert len(rows) > 10
    for row in rows:
        cls = type(model.get_submodule(row.name))
        assert cls is not before[row.name]
        assert {before[row.name]: 1}.get(cls) == 1


def test_classes_derived_from_ours_are_classes_of_their_own():
    class Mine(fastlm.nn.Linear):
        pass

    assert Mine != nn.Linear
    assert Mine != fastlm.nn.Linear
    assert Mine == Mine
    assert len({Mine, nn.Linear, fastlm.nn.Linear}) == 2
    assert fastlm.nn.Embedding != nn.Embedding  # it may add positions, which a quantized one would lose
    assert fastlm.nn.Linear != nn.LayerNorm
    layer = parametrize.register_parametrization(fastlm.nn.Linear(3, 3), "weight", nn.Identity())
    assert nn.Linear not in [type(layer)]
    assert torch.ao.quantization.utils.get_combined_dict({nn.Linear: 1}, {fastlm.nn.Linear: 2}) == {nn.Linear: 2}


def test_a_module_with_a_metaclass_is_swapped_too():
    from abc import ABC

    class Norm(nn.LayerNorm, ABC):
        pass

    holder = nn.ModuleList([Norm(E)])
    assert len(fastlm.accelerate(holder).replaced) == 1
    assert type(holder[0]) in [Norm]
    assert type(holder[0]) is not Norm
    x = torch.randn(3, E)
    torch.testing.assert_close(holder[0](x), nn.LayerNorm(E)(x))


def test_whole_modules_are_saved_and_copied_as_what_they_are():
    model = Model()
    fastlm.accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        for mine, theirs in zip(other.modules(), model.modules(), strict=True):
            assert type(mine) is type(theirs)
        assert fastlm.restore(other)
        assert type(other.head) is nn.Linear
