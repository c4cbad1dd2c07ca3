"""BERT and RoBERTa: equal to transformers' in both directions, and free of padding."""

import dataclasses

import pytest
import torch

import fastlm
from fastlm.errors import CheckpointError, ConfigError
from fastlm.formats.hf.bert import BERT_FOLDER, ROBERTA_FOLDER
from fastlm.models import BERT, BERTConfig
from hf import CLOSE, check_gradients, perturbed, reload_as_theirs, transformers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 4,
}
KINDS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "RobertaModel",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
)
LENGTHS = torch.tensor([11, 4, 1, 7])
SMALL = BERTConfig(61, 24, 2, 2, 16, 40, n_token_type=3, dropout=0.0, attention_dropout=0.0)


def their_model(kind, **changes):
    torch.manual_seed(0)
    family = "Roberta" if kind.startswith("Roberta") else "Bert"
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    return perturbed(getattr(transformers, kind)(config))


def loaded(kind, folder, **changes):
    theirs = their_model(kind, **changes)
    theirs.save_pretrained(folder)
    return theirs, fastlm.load(folder)


def some_inputs(padding="right"):
    """Tokens, attention mask and token types; RoBERTa finds its padding by id 1."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 61, (4, 11), generator=generator)
    types = torch.randint(3, (4, 11), generator=generator)
    mask = torch.arange(11) < LENGTHS[:, None]
    if padding == "left":
        mask = mask.flip(1)
    if padding == "none":
        mask = torch.ones_like(mask)
    if padding == "holes":
        mask = torch.rand(4, 11, generator=generator) < 0.6
        mask[:, 3] = True
    return tokens.masked_fill(~mask, 1), mask.long(), types


def gradient_names(ours, kind):
    """Our names and theirs in full, by the table that also loads the folder; values are compared apart from it."""
    architecture = ROBERTA_FOLDER if kind.startswith("Roberta") else BERT_FOLDER
    parts = architecture.parts(ours.config, {name: p.shape for name, p in ours.named_parameters()})
    return {name: tuple(architecture.full_name(p.name, not kind.endswith("Model")) for p in group)
            for name, group in parts.items()}  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_theirs(kind, padding, tmp_path):
    theirs, ours = loaded(kind, tmp_path)
    tokens, mask, types = some_inputs(padding)
    if "Classification" in kind and padding in ("left", "holes"):
        pytest.skip("theirs reads its class at column 0, padding or not")
    expected = theirs(tokens, attention_mask=mask, token_type_ids=types)[0]
    out = ours(tokens, mask, types)
    if expected.dim() == 3:
        assert not out[mask == 0].any()
        out, expected = out[mask > 0], expected[mask > 0]
    torch.testing.assert_close(out, expected, **CLOSE)
    if padding == "none":
        torch.testing.assert_close(ours(tokens, None, types), ours(tokens, mask, types), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_they_load_what_we_save(kind, tmp_path):
    theirs, ours = loaded(kind, tmp_path)
    fastlm.save(ours, tmp_path / "again")
    again = reload_as_theirs(type(theirs), tmp_path / "again")
    tokens, mask, types = some_inputs()
    torch.testing.assert_close(
        again(tokens, attention_mask=mask, token_type_ids=types)[0],
        theirs(tokens, attention_mask=mask, token_type_ids=types)[0],
        rtol=0,
        atol=0,
    )
    assert fastlm.load(tmp_path / "again").config == ours.config


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining", "RobertaForMaskedLM"])
def test_masked_lm_losses_and_gradients_equal_theirs(kind, tmp_path):
    theirs, ours = loaded(kind, tmp_path)
    tokens, mask, types = some_inputs()
    chosen = (torch.rand(4, 11, generator=torch.Generator().manual_seed(2)) < 0.4) & (mask > 0)
    chosen[0, 0] = True
    targets = tokens.flip(0).masked_fill(~chosen, -100)
    extra, follows = {}, None
    if kind == "BertForPreTraining":
        follows = torch.tensor([0, 1, 1, 0])
        extra = {"next_sentence_label": follows}
    expected = theirs(tokens, attention_mask=mask, token_type_ids=types, labels=targets, **extra).loss
    expected.backward()
    loss = ours.loss(tokens, targets, mask, types, follows)
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    check_gradients(ours, theirs, gradient_names(ours, kind))


@pytest.mark.parametrize(("classes", "targets"), [(4, [0, 3, 1, 2]), (1, [0.5, -1.0, 2.0, 0.0])])
def test_classification_losses_and_gradients_equal_theirs(classes, targets, tmp_path):
    kind = "BertForSequenceClassification"
    theirs, ours = loaded(kind, tmp_path, num_labels=classes)
    tokens, mask, types = some_inputs()
    targets = torch.tensor(targets)
    expected = theirs(tokens, attention_mask=mask, token_type_ids=types, labels=targets).loss
    expected.backward()
    loss = ours.loss(tokens, targets, mask, types)
    loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    check_gradients(ours, theirs, gradient_names(ours, kind))


def test_next_sentence_and_pooled_equal_theirs(tmp_path):
    theirs, ours = loaded("BertForPreTraining", tmp_path)
    tokens, mask, types = some_inputs()
    pooled = ours.pooled(*ours.encode(tokens, mask, types))
    inner = theirs.bert(tokens, attention_mask=mask, token_type_ids=types)
    torch.testing.assert_close(pooled, inner.pooler_output, **CLOSE)
    expected = theirs(tokens, attention_mask=mask, token_type_ids=types).seq_relationship_logits
    torch.testing.assert_close(ours.next_sentence_logits(pooled), expected, **CLOSE)


def test_tanh_gelu_and_a_file_with_the_other_heads_load(tmp_path):
    # As in the published bert-base-uncased: named after the masked-lm head, with all of pretraining's tensors.
    theirs = their_model("BertForPreTraining", hidden_act="gelu_new")
    theirs.config.architectures = ["BertForMaskedLM"]
    torch.save(dict(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    ours = fastlm.load(tmp_path)
    assert ours.config.head == "masked-lm"
    assert ours.config.activation == "tanh"
    tokens, mask, types = some_inputs()
    expected = theirs(tokens, attention_mask=mask, token_type_ids=types).prediction_logits
    torch.testing.assert_close(ours(tokens, mask, types)[mask > 0], expected[mask > 0], **CLOSE)


def test_layers_see_no_padding():
    model, seen = perturbed(BERT(SMALL)), []
    model.layers[0].down.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    tokens, mask, types = some_inputs()
    model(tokens, mask, types)
    model(tokens, None, types)
    assert seen == [LENGTHS.sum(), 44]


@pytest.mark.parametrize("kind", ["none", "classification"])
@pytest.mark.parametrize("left", [False, True])
def test_compiled_exported_and_watched_models_keep_their_padding(kind, left):
    """How much there is of it is not known to a graph, and maps are over whole sequences; the results are the same."""
    model = perturbed(BERT(dataclasses.replace(SMALL, head=kind, pooler=True)))
    tokens, mask, types = some_inputs()
    mask = mask.flip(1) if left else mask
    expected = model(tokens, mask, types)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, mask, types), expected, **CLOSE)
    exported = torch.export.export(model, (tokens, mask, types), strict=False).module()
    torch.testing.assert_close(exported(tokens, mask, types), expected, **CLOSE)
    maps = fastlm.attention_maps(model, (tokens, mask, types))
    assert list(maps) == [f"layers.{i}.attention" for i in range(SMALL.n_layer)]
    for weights in maps.values():
        real = mask[:, None, None].expand_as(weights) > 0
        assert not weights[~real].any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_a_watched_loss_is_the_loss():
    model = perturbed(BERT(SMALL))
    tokens, mask, _ = some_inputs()
    expected = model.loss(tokens, tokens, mask)
    with fastlm.attention_telemetry(model) as telemetry:
        torch.testing.assert_close(model.loss(tokens, tokens, mask), expected)
    assert len(telemetry) == SMALL.n_layer


def test_only_positions_that_count_reach_the_vocabulary():
    model, seen = perturbed(BERT(SMALL)), []
    model.masked_lm.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    tokens, mask, _ = some_inputs()
    targets = torch.full_like(tokens, -100)
    targets[0, 2:5] = 7
    model.loss(tokens, targets, mask)
    assert seen == [3]


def test_padding_and_neighbours_change_nothing():
    model = perturbed(BERT(dataclasses.replace(SMALL, head="none")))
    tokens, mask, types = some_inputs()
    together = model(tokens, mask, types)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(tokens[row : row + 1, :length], None, types[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], **CLOSE)


def test_a_row_of_padding_alone_is_zero():
    model = perturbed(BERT(dataclasses.replace(SMALL, head="none", pooler=True)))
    tokens, mask, _ = some_inputs()
    mask[3] = 0
    hidden, packing = model.encode(tokens, mask)
    assert not packing.unpack(hidden)[3].any()
    assert torch.equal(packing.first(hidden)[3], torch.zeros(16))
    hidden, packing = model.encode(tokens, torch.zeros_like(mask))
    assert not packing.unpack(hidden).any()
    assert not packing.first(hidden).any()


def test_dropout_acts_in_training_only():
    model = perturbed(BERT(dataclasses.replace(SMALL, dropout=0.3, attention_dropout=0.3)))
    tokens, mask, _ = some_inputs()
    assert torch.equal(model(tokens, mask), model(tokens, mask))
    model.train()
    assert not torch.equal(model(tokens, mask), model(tokens, mask))


def test_sizes_of_bert_base():
    with torch.device("meta"):
        model = BERT(BERTConfig(30522, 512, 12, 12, 768, head="none", pooler=True))
    assert model.num_parameters() == 109_482_240  # as published


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_embd is 16, expected a multiple of n_head 3"),
        ({"head": "question"}, "head is 'question', expected none or masked-lm or pretraining or classification"),
        ({"head": "pretraining"}, "pooler is False, expected true for the head pretraining"),
        ({"activation": "relu"}, "activation is 'relu', expected none or tanh"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1.0, expected a number in \[0, 1\)"),
    ],
)
def test_refuses_impossible_sizes(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_refuses_bad_inputs():
    model = perturbed(BERT(SMALL))
    tokens, mask, types = some_inputs()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 10\), expected \(4, 11\) as tokens has"):
        model(tokens, mask[:, 1:])
    with pytest.raises(ValueError, match="token_types holds the id 5, expected ids from 0 to 2"):
        model(tokens, mask, types.clamp(min=5))
    with pytest.raises(ValueError, match="loss needs a head"):
        BERT(dataclasses.replace(SMALL, head="none")).loss(tokens, tokens)


def test_names_the_class_and_settings_that_are_not_known(tmp_path):
    theirs = their_model("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    for changes, message in (
        ({"architectures": ["BertForTokenClassification"]}, "architectures is BertForTokenClassification, expected"),
        ({"hidden_act": "relu"}, 'hidden_act is "relu", expected "gelu"'),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type is "relative_key", expected "absolute"'),
    ):
        theirs.config.update(changes)
        theirs.config.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            fastlm.load(tmp_path)
        theirs.config.update({"hidden_act": "gelu", "architectures": ["BertForMaskedLM"]})
