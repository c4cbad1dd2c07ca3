"""The encoder-decoder Transformer: equal to torch.nn.Transformer and transformers' Marian; greedy and beam search."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.errors import CheckpointError, ConfigError
from fastlm.inference import beam_search, greedy_search
from fastlm.models import Seq2Seq, Seq2SeqConfig
from fastlm.models.common.decoder_cache import DecoderCache
from fastlm.models.seq2seq import sinusoids
from hf import CLOSE, perturbed, reload_as_theirs, transformers

SMALL = Seq2SeqConfig(61, 32, 2, 2, 4, 16, 40, dropout=0.0)
LENGTHS = torch.tensor([9, 5, 1])
PAD = 60


def our_model(config=SMALL, **changes):
    torch.manual_seed(0)
    return perturbed(Seq2Seq(dataclasses.replace(config, **changes)))


def some_batch(vocab_size=61, pad=0, start=1):
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, vocab_size - 1, (3, 9), generator=generator)
    source = source.masked_fill(torch.arange(9) >= LENGTHS[:, None], pad)
    target = torch.randint(3, vocab_size - 1, (3, 7), generator=generator)
    target[:, 0] = start
    return source, target


# Against torch.nn.Transformer


def as_torchs(ours):
    """torch.nn.Transformer with our weights."""
    c = ours.config
    theirs = torch.nn.Transformer(
        c.n_embd, c.n_head, c.n_encoder_layer, c.n_decoder_layer, c.n_inner, 0.0, c.activation,
        batch_first=True, norm_first=c.norm_first,
    )  # fmt: skip
    if not c.norm_first:
        theirs.encoder.norm = theirs.decoder.norm = None
    for mine, other in zip(ours.encoder, theirs.encoder.layers, strict=True):
        copy_layer(mine, other, "norm2")
    for mine, other in zip(ours.decoder, theirs.decoder.layers, strict=True):
        copy_layer(mine, other, "norm3")
        cross = other.multihead_attn
        cross.in_proj_weight.data = torch.cat([mine.cross_attention.q.weight, mine.cross_attention.kv.weight])
        cross.in_proj_bias.data = torch.cat([mine.cross_attention.q.bias, mine.cross_attention.kv.bias])
        cross.out_proj.load_state_dict(mine.cross_attention.out.state_dict())
        other.norm2.load_state_dict(mine.cross_norm.state_dict())
    if c.norm_first:
        theirs.encoder.norm.load_state_dict(ours.encoder_norm.state_dict())
        theirs.decoder.norm.load_state_dict(ours.decoder_norm.state_dict())
    return theirs.eval()


def copy_layer(mine, other, mlp_norm):
    other.self_attn.in_proj_weight.data = mine.attention.qkv.weight
    other.self_attn.in_proj_bias.data = mine.attention.qkv.bias
    other.self_attn.out_proj.load_state_dict(mine.attention.out.state_dict())
    other.norm1.load_state_dict(mine.attention_norm.state_dict())
    other.linear1.load_state_dict(mine.up.state_dict())
    other.linear2.load_state_dict(mine.down.state_dict())
    getattr(other, mlp_norm).load_state_dict(mine.mlp_norm.state_dict())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_torchs_transformer(norm_first, positions, activation):
    ours = our_model(norm_first=norm_first, positions=positions, activation=activation)
    source, target = some_batch()
    theirs = as_torchs(ours)
    tables = (
        (ours.source_wpe.weight, ours.target_wpe.weight) if positions == "learned" else (paper_positions(32, 16),) * 2
    )
    embed = [ours.wte(x) * 4 + table[: x.shape[1]] for x, table in zip((source, target), tables, strict=True)]
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    padding = source == 0
    with torch.no_grad():
        hidden = theirs(
            *embed, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        torch.testing.assert_close(ours(source, target), hidden @ ours.wte.weight.t(), **CLOSE)


def paper_positions(length, C):
    """Section 3.5 of the paper, element by element, sines before cosines."""
    angle = [[pos / 10000 ** (2 * i / C) for i in range(C // 2)] for pos in range(length)]
    return torch.tensor([[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angle])


def test_sinusoids_are_the_papers():
    torch.testing.assert_close(sinusoids(0, 50, 16, torch.device("cpu")), paper_positions(50, 16))
    torch.testing.assert_close(sinusoids(7, 3, 16, torch.device("cpu")), paper_positions(10, 16)[7:])


def test_loss_smooths_labels_in_training_and_leaves_padding_out():
    model = our_model(label_smoothing=0.1, output_bias=True, tie_embeddings=False, source_vocab_size=70)
    source, target = some_batch()
    targets = torch.cat([target[:, 1:], torch.full((3, 1), 2)], 1)
    targets[1, 4:] = 0
    logits = model(source, target.masked_fill(F.pad(targets[:, :-1] == 0, (1, 0)), 0))
    flat, counted = logits.flatten(0, 1), targets.flatten()
    for smoothing, mode in ((0.1, True), (0.0, False)):
        expected = F.cross_entropy(flat, counted, ignore_index=0, label_smoothing=smoothing)
        torch.testing.assert_close(model.train(mode).loss(source, targets), expected, **CLOSE)
    ignored = targets.masked_fill(targets == 0, -100)
    torch.testing.assert_close(model.loss(source, ignored), model.loss(source, targets), rtol=0, atol=0)


def test_neither_padding_nor_later_tokens_matter():
    model = our_model()
    source, target = some_batch()
    together = model(source, target)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(source[row : row + 1, :length], target[row : row + 1, :5])
        torch.testing.assert_close(together[row, :5], alone[0], **CLOSE)


def test_compiles_exports_and_shows_its_attention_with_padding():
    model = our_model()
    source, target = some_batch()
    expected = model(source, target)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, target), expected, **CLOSE)
    exported = torch.export.export(model, (source, target), strict=False).module()
    torch.testing.assert_close(exported(source, target), expected, **CLOSE)
    maps = fastlm.attention_maps(model, (source, target))
    assert len(maps) == model.config.n_encoder_layer + 2 * model.config.n_decoder_layer
    seen = (source != model.config.pad_id)[:, None, None]
    assert not maps["encoder.0"].masked_fill(seen, 0.0).any()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pieces", [(1,) * 7, (3, 4)])
def test_cache_changes_nothing(norm_first, pieces):
    model = our_model(norm_first=norm_first, positions="learned")
    source, target = some_batch()
    with torch.no_grad():
        memory = model.encode(source)
        cache = DecoderCache(model, memory, 1, 7)
        parts = [model.decode(part.contiguous(), memory, cache) for part in target.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model.decode(target, memory), **CLOSE)


# Search


TINY = Seq2SeqConfig(6, 8, 1, 1, 2, 8, 16, dropout=0.0)


def log_probability(model, source, tokens):
    """Of one sequence (L,), by one uncached pass."""
    target = torch.cat([torch.tensor([model.config.start_id]), tokens[:-1]])
    with torch.no_grad():
        log_p = model(source[None], target[None]).log_softmax(-1)[0]
    return log_p[torch.arange(len(tokens)), tokens].sum().item()


def every_sequence(config, length):
    """All that end within `length` tokens, or are that long; padding is no token."""
    others = [i for i in range(config.vocab_size) if i not in (config.pad_id, config.end_id)]
    for L in range(1, length + 1):
        for beginning in itertools.product(others, repeat=L - 1):
            for last in [config.end_id] if length > L else [*others, config.end_id]:
                yield torch.tensor([*beginning, last])


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all(length_penalty):
    model = our_model(TINY)
    source = torch.tensor([[3, 4, 5, 3], [5, 5, 0, 0]])
    found = beam_search(model, source, 4, 64, length_penalty=length_penalty, n_best=3)
    for row in range(2):
        scores = {
            tuple(s.tolist()): log_probability(model, source[row], s) / len(s) ** length_penalty
            for s in every_sequence(TINY, 4)
        }
        best = sorted(scores, key=scores.get, reverse=True)[:3]
        for k, wanted in enumerate(best):
            got = found.tokens[row, k][: len(wanted)]
            assert tuple(got.tolist()) == wanted
            assert not found.tokens[row, k, len(wanted) :].any()
            assert found.scores[row, k].item() == pytest.approx(scores[wanted], abs=1e-4)


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_scores_are_those_of_the_sequences(beams):
    model = our_model()
    source, _ = some_batch()
    tokens, scores = beam_search(model, source, 12, beams, length_penalty=0.7, n_best=beams)
    for row in range(3):
        for k in range(beams):
            sequence = tokens[row, k]
            sequence = sequence[: int((sequence != 0).sum())]
            expected = log_probability(model, source[row], sequence) / len(sequence) ** 0.7
            assert scores[row, k].item() == pytest.approx(expected, abs=1e-3)
        assert scores[row].tolist() == sorted(scores[row].tolist(), reverse=True)


def test_greedy_takes_the_likeliest_at_every_step_and_stops():
    model = our_model()
    source, _ = some_batch()
    tokens = greedy_search(model, source, 10)
    for row in range(3):
        target = torch.tensor([SMALL.start_id])
        for token in tokens[row].tolist():
            logits = model(source[row : row + 1], target[None])[0, -1]
            logits[SMALL.pad_id] = -math.inf
            assert token == (0 if 2 in target[1:] else logits.argmax().item())
            target = torch.cat([target, torch.tensor([token])])


def test_refuses_impossible_searches():
    model, (source, _) = our_model(), some_batch()
    for settings, message in (
        ({"beams": 0}, "beams is 0, expected at least 1"),
        ({"n_best": 5}, "n_best is 5, expected 1 to the 4 beams"),
        ({"length_penalty": math.nan}, "length_penalty is nan, expected a finite number"),
        ({"max_new_tokens": 33}, "max_new_tokens is 33, expected 1 to the context of 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            beam_search(model, source, **({"max_new_tokens": 5} | settings))


# Against transformers' Marian


def their_model(**changes):
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    settings = {
        "vocab_size": 61,
        "d_model": 16,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "eos_token_id": 0,
        "forced_eos_token_id": None,
        "activation_function": "swish",
        "scale_embedding": True,
        "dropout": 0.0,
    }
    model = perturbed(transformers.MarianMTModel(transformers.MarianConfig(**(settings | sizes | changes))))
    model.final_logits_bias.copy_(torch.randn(1, 61))
    return model


@pytest.mark.parametrize("changes", [{}, {"activation_function": "gelu", "scale_embedding": False}])
def test_equals_marian_both_ways(changes, tmp_path):
    theirs = their_model(**changes)
    theirs.save_pretrained(tmp_path)
    ours = fastlm.load(tmp_path)
    source, target = some_batch(pad=PAD, start=PAD)
    expected = theirs(source, attention_mask=(source != PAD).long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours(source, target), expected, **CLOSE)
    fastlm.save(ours, tmp_path / "again")
    again = reload_as_theirs(transformers.MarianMTModel, tmp_path / "again")
    out = again(source, attention_mask=(source != PAD).long(), decoder_input_ids=target).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert fastlm.load(tmp_path / "again").config == ours.config


def test_gradients_equal_marians(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    ours = fastlm.load(tmp_path)
    source, target = some_batch(pad=PAD, start=PAD)
    targets = target[:, 1:].contiguous()
    targets[2, 3:] = -100
    expected = theirs(source, attention_mask=(source != PAD).long(), labels=targets).loss
    expected.backward()
    loss = ours.loss(source, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    # Theirs gives its start token, as padding, no gradient where it is looked up.
    torch.testing.assert_close(ours.wte.weight.grad[:PAD], theirs.model.shared.weight.grad[:PAD], **CLOSE)
    mine, other = ours.decoder[1], theirs.model.decoder.layers[1]
    torch.testing.assert_close(mine.cross_attention.q.weight.grad, other.encoder_attn.q_proj.weight.grad, **CLOSE)
    torch.testing.assert_close(ours.encoder[0].up.bias.grad, theirs.model.encoder.layers[0].fc1.bias.grad, **CLOSE)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
def test_beam_search_equals_theirs(length_penalty, tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    source, _ = some_batch(pad=PAD)
    expected = theirs.generate(
        source,
        attention_mask=(source != PAD).long(),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=11,
        length_penalty=length_penalty,
        early_stopping="never",  # theirs else gives up by the length so far, which may miss the best
        do_sample=False,
        suppress_tokens=[PAD],
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens, scores = beam_search(fastlm.load(tmp_path), source, 11, 4, length_penalty=length_penalty, n_best=4)
    torch.testing.assert_close(scores.flatten(), expected.sequences_scores, **CLOSE)
    assert torch.equal(tokens.flatten(0, 1), expected.sequences[:, 1 : 1 + tokens.shape[2]])


def test_greedy_search_equals_theirs(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    source, _ = some_batch(pad=PAD)
    expected = theirs.generate(
        source, attention_mask=(source != PAD).long(), max_new_tokens=11, do_sample=False, suppress_tokens=[PAD]
    )
    tokens = greedy_search(fastlm.load(tmp_path), source, 11)
    assert torch.equal(tokens, expected[:, 1 : 1 + tokens.shape[1]])


# Its own edges


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_embd is 16, expected a multiple of n_head 3"),
        ({"positions": "rotary"}, "positions is 'rotary', expected sinusoidal or learned"),
        ({"end_id": 61}, "end_id is 61, expected an id of the vocabulary"),
        ({"source_vocab_size": 70}, "source_vocab_size is 70, expected vocab_size 61, as the embeddings are tied"),
        ({"label_smoothing": 1}, r"label_smoothing is 1, expected a number in \[0, 1\)"),
    ],
)
def test_refuses_impossible_sizes(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_refuses_bad_tokens():
    model, (source, target) = our_model(), some_batch()
    with pytest.raises(ValueError, match="source of length 33 does not fit the context of 32"):
        model(torch.ones(1, 33, dtype=torch.int64), target)
    with pytest.raises(ValueError, match="target holds the id 61, expected ids from 0 to 60"):
        model(source, target.clamp(min=61))
    with pytest.raises(ValueError, match=r"source_mask has shape \(3, 8\), expected \(3, 9\) as source has"):
        model(source, target, torch.ones(3, 8))


def test_says_what_marian_cannot_express(tmp_path):
    with pytest.raises(CheckpointError, match="Marian has norm_first False, this model True"):
        fastlm.save(our_model(norm_first=True, output_bias=True), tmp_path)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_empty_batches_and_targets(batch, length):
    source, target = (torch.ones(batch, size, dtype=torch.long) for size in (3, length))
    assert Seq2Seq(SMALL)(source, target).shape == (batch, length, 61)
