"""The logits of an accelerated model in training: stock transformers' in every use that a script makes of them."""

from __future__ import annotations

import copy
import importlib
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

import fastlm
from fastlm.integrations import losses
from fastlm.ops._thresholds import MANY_CLASSES, SMALL_IN_TRAINING
from tolerances import assert_as_close_as_torch

V, H, B, T = MANY_CLASSES + 3, 128, 2, 66  # the output layer is one of many classes, and its product a large one
assert V * H * B * T > SMALL_IN_TRAINING
SIZES = {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 44, "vocab_size": V}
LLAMA = SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = SPECIAL | {"d_model": H, "vocab_size": V, "max_position_embeddings": 128} | {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 44))
}  # fmt: skip
MODELS = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(
        vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=128, **SPECIAL)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA)),
    "tied": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**LLAMA, tie_word_embeddings=True)),
    "softcap": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**LLAMA, final_logit_softcapping=3.0)),
    "scaled": (transformers.CohereForCausalLM, transformers.CohereConfig(
        **LLAMA, logit_scale=0.25, bos_token_id=1, eos_token_id=2)),
    "divided": (transformers.GraniteForCausalLM, transformers.GraniteConfig(**LLAMA, logits_scaling=3.0)),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SIZES)),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(
        vocab_size=V, d_model=H, d_kv=8, d_ff=44, num_layers=1, num_heads=2, decoder_start_token_id=0)),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig(**SEQ2SEQ)),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", MODELS)
IDS = torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.7, -100)
BEYOND = 4000


def twins(name):
    """(stock, accelerated) of one state, without dropout."""
    kind, config = MODELS[name]
    config = copy.deepcopy(config)
    for key in list(config.to_dict()):
        if "dropout" in key or key.endswith("pdrop"):
            setattr(config, key, 0.0)
    stock = kind(config).train()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model = copy.deepcopy(stock)
    fastlm.accelerate(model)
    return stock, model


def forward(model, **options):
    if model.config.is_encoder_decoder:
        options.setdefault("decoder_input_ids", IDS)
    return model(input_ids=IDS, **options)


def gradients(model):
    """The parameters' gradients, which are taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(stock, model, step, dtype=torch.float32):
    """`step(model)` gives tensors, and leaves gradients: those of both models agree within rounding."""
    results = []
    for each in (stock, model):
        values = step(each)
        values = values if isinstance(values, tuple) else (values,)
        results.append(({str(i): x.detach() for i, x in enumerate(values)}, gradients(each)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for expected, actual in zip(*results, strict=True):
        assert actual.keys() == expected.keys()
        largest = max((x.norm() for x in expected.values()), default=0)
        for key, x in expected.items():
            assert actual[key].dtype == x.dtype
            error = (actual[key].double() - x.double()).norm()
            assert error <= tolerance * (x.norm() + 1e-3 * largest), f"{key}: {error:.2e} of {x.norm():.2e}"


def outside(logits):
    return F.cross_entropy(logits.reshape(-1, V), LABELS.view(-1))


def _set(logits):
    logits[..., BEYOND:] = -1e4


def _data(logits):
    logits.data[..., BEYOND:] = -1e4


def _detached(logits):
    logits.detach().mul_(0.5)


def _float(logits):
    logits.float().mul_(2)  # in fp32 the logits themselves


def _without_gradient(logits):
    with torch.no_grad():
        logits[:, :, :5] -= 3


def _out(logits):
    with torch.no_grad():
        torch.mul(logits, 2, out=logits)


EDITS = {
    "setitem": _set,
    "data": _data,
    "detach": _detached,
    "no_grad": _without_gradient,
    "out": _out,
    "float": _float,
    "mul_": lambda y: y.mul_(0.5),
    "div_": lambda y: y.div_(3),
    "clamp_": lambda y: y.clamp_(-0.5, 0.5),
    "masked_fill_": lambda y: y.masked_fill_(torch.arange(V) > BEYOND, -1e4),
    "index_add_": lambda y: y.index_add_(2, torch.tensor([1, 7]), torch.ones(B, T, 2, dtype=y.dtype)),
    "index_fill_": lambda y: y.index_fill_(2, torch.tensor([1, 7]), -9.0),
    "scatter_": lambda y: y.scatter_(2, IDS[..., None], 2.0),
    "copy_": lambda y: y.copy_(y.flip(-1)),
    "view": lambda y: y.view(-1, V)[:, 5:900].zero_(),
    "contiguous": lambda y: y.contiguous().mul_(2),
    "narrow": lambda y: y.narrow(2, 0, 50).relu_(),
    "transpose": lambda y: y.transpose(0, 1)[3:].neg_(),
    "select": lambda y: y.select(1, 2).tanh_(),
    "to": lambda y: y.to(y.device).to(y.dtype).mul_(2),
    "slice twice": lambda y: y[:, 1:][:, :-1].sigmoid_(),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["gpt2", "bert", "softcap"])
def test_an_edit_of_the_logits_counts(name, edit):
    stock, model = twins(name)

    def step(model):
        logits = forward(model).logits
        EDITS[edit](logits)
        loss = outside(logits)
        loss.backward()
        return loss, logits

    assert_same(stock, model, step)


@EVERY
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_an_edit_of_the_logits_counts_in_every_model(name, low):
    stock, model = twins(name)

    def step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = forward(model).logits
            logits[..., BEYOND:] = -1e4
            loss = outside(logits)
        loss.backward()
        return loss, logits

    assert_same(stock, model, step, torch.bfloat16 if low else torch.float32)


READS = {
    "view(size=)": lambda y: y.view(size=(-1, V)),
    "reshape(shape=)": lambda y: y.reshape(shape=(-1, V)),
    "float(memory_format=)": lambda y: y.float(memory_format=torch.preserve_format),
    "to(dtype=)": lambda y: y.to(dtype=torch.float64),
    "ellipsis last": lambda y: y[:, :, :BEYOND, ...].log_softmax(-1),
    "ellipsis first": lambda y: y[..., 1:, :],
    "chunks": lambda y: torch.cat([c.float().softmax(-1) for c in y.chunk(3, 1)]),
    "functional": lambda y: torch.softmax(input=y, dim=-1),
    "squeezed": lambda y: y[:1].squeeze(dim=0),
    "list": lambda y: y[0, [1, 2, 3]],
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
def test_every_form_of_a_call_reads_the_logits(read):
    stock, model = twins("gpt2")

    def step(model):
        y = READS[read](forward(model).logits)
        (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
        return y

    assert_same(stock, model, step)


@EVERY
def test_the_logits_are_a_tensor_of_the_graph(name):
    stock, model = twins(name)
    assert type(forward(model).logits) is torch.Tensor

    def step(model):
        output, seen = forward(model, labels=LABELS), []
        output.logits.retain_grad()
        output.logits.register_hook(lambda grad: seen.append(grad.clone()))
        output.logits.register_hook(lambda grad: 2 * grad)
        (by_grad,) = torch.autograd.grad(output.loss, output.logits, retain_graph=True)
        seen.clear()
        output.loss.backward()
        return output.loss, by_grad, seen[0], output.logits.grad, output.logits

    assert_same(stock, model, step)


@EVERY
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_a_loss_of_labels_keeps_to_the_logits_that_it_saw(name, low):
    """However they are edited before its backward pass; which may run twice."""
    stock, model = twins(name)

    def step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = forward(model, labels=LABELS)
        loss = output.loss
        with torch.no_grad():
            output.logits[..., :50] = 7
        output.logits.data.mul_(3)
        (loss / 3).backward(retain_graph=True)
        (loss * 5).backward()
        return loss

    assert_same(stock, model, step, torch.bfloat16 if low else torch.float32)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_hooks_on_the_output_layer_see_and_change_it(name):
    stock, model = twins(name)

    def step(model):
        head, seen = model.get_output_embeddings(), []
        handles = [
            head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
            head.register_forward_hook(lambda module, args, y: y.clamp(-1, 1)),
            head.register_full_backward_hook(lambda module, before, grads: seen.append(grads[0])),
        ]
        loss = forward(model, labels=LABELS).loss
        loss.backward()
        for handle in handles:
            handle.remove()
        return loss, seen[0]

    assert_same(stock, model, step)


class LowRank(nn.Module):
    """A wrapper as LoRA's: the layer plus a small product."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.t() @ self.b.t()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_wrapped_output_layer(name, late):
    stock, model = twins(name)
    for each in (stock, model):
        if each is model and not late:
            fastlm.restore(model)
        for parameter in each.parameters():
            parameter.requires_grad_(False)
        each.set_output_embeddings(LowRank(each.get_output_embeddings()))
        if each is model and not late:
            fastlm.accelerate(model)

    def step(model):
        loss = forward(model, labels=LABELS).loss
        loss.backward()
        return loss

    assert_same(stock, model, step)


class Counted(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 1.5


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("parametrization", ["spectral_norm", "weight_norm", "counted"])
def test_a_parametrized_output_layer_is_evaluated_once(name, late, parametrization):
    """A step of spectral_norm's power iteration for each evaluation: gradients and buffers tell how many there were."""
    stock, model = twins(name)
    state = torch.get_rng_state()
    for each in (stock, model):
        if each is model and not late:
            fastlm.restore(model)
        torch.set_rng_state(state)
        head = each.get_output_embeddings()
        if parametrization == "counted":
            parametrize.register_parametrization(head, "weight", Counted())
        else:
            getattr(parametrizations, parametrization)(head)
        if each is model and not late:
            fastlm.accelerate(model)

    def step(model):
        parametrized = model.get_output_embeddings().parametrizations.weight[0]
        Counted.calls = parametrized.calls = 0
        found = []
        for labels in (LABELS, None):
            output = forward(model, labels=labels)
            loss = output.loss if labels is not None else outside(output.logits)
            loss.backward()
            found += [loss, torch.tensor(float(parametrized.calls))]
        return *found, *(x.clone() for x in parametrized.buffers())

    assert_same(stock, model, step)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bart"])
def test_checkpointed_layers_and_counted_items(name):
    stock, model = twins(name)
    for each in (stock, model):
        enable = "activation_checkpointing_enable" if hasattr(each, "activation_checkpointing_enable") else None
        getattr(each, enable or "gradient_checkpointing_enable")({"use_reentrant": False})

    def step(model):
        options = {} if name == "bert" else {"use_cache": False}
        options |= {"num_items_in_batch": torch.tensor(7)} if name in ("gpt2", "llama") else {}
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(model, labels=LABELS, **options).loss
        loss.backward()
        return loss

    assert_same(stock, model, step, torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.2}, {"gradient_accumulation_steps": 3, "bf16": True}])
def test_trainer(name, options, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    examples = [{"input_ids": IDS[i % B, : T - i], "labels": LABELS[i % B, : T - i]} for i in range(6)]

    def collate(rows):  # rows of one length; with label smoothing, a model is not shown the labels
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        return batch | ({"decoder_input_ids": batch["input_ids"]} if name == "t5" else {})

    def run(model):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=1, learning_rate=0.1, optim="sgd", report_to=[],
            lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=0,
            dataloader_pin_memory=False, logging_steps=1, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=examples, data_collator=collate)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found = [torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return *found, *(p.detach().clone() for p in model.parameters())

    assert_same(*twins(name), run, torch.bfloat16 if "bf16" in options else torch.float32)


def _train_in_parallel(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for options in (
        {}, {"find_unused_parameters": True}, {"static_graph": True},
        {"find_unused_parameters": True, "static_graph": True},
    ):  # fmt: skip
        for name in ("gpt2", "bert"):
            torch.manual_seed(0)

            def step(model, options=options):
                wrapped = nn.parallel.DistributedDataParallel(model, **options)
                for _ in range(2):
                    wrapped.zero_grad()
                    ids = IDS.roll(rank, 1)
                    logits = wrapped(input_ids=ids).logits  # the loss is outside
                    F.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)).backward()
                return logits

            stock, model = twins(name)
            if options.get("find_unused_parameters"):
                for each in (stock, model):
                    each.unused = nn.Linear(2, 2)
            assert_same(stock, model, step)
            assert any(p.grad is None for p in model.parameters())  # taken away: there were some
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_with_the_loss_outside(tmp_path):
    # Under the name that other processes find it by: they have tests/ on their path, but not the folder above.
    worker = importlib.import_module("integrations.test_huggingface_logits")._train_in_parallel
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("loss", [ForCausalLMLoss, ForMaskedLMLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(9)}, {"ignore_index": 5}], ids=str)
def test_the_loss_of_a_copy_is_as_close_as_stocks(loss, dtype, options):
    logits = 3 * torch.randn(B, T, V, dtype=torch.float64)
    labels = IDS.masked_fill(IDS % 7 == 0, options.get("ignore_index", -100))
    results = []
    for function, kind in (
        (lambda *args, **given: losses.language_model_loss(loss, *args, **given), dtype),
        (loss, dtype), (lambda x, *args, **given: loss(_Exact.of(x), *args, **given), torch.float64),
    ):  # fmt: skip
        x = logits.to(dtype).to(kind).requires_grad_()
        value = function(x, labels, V, **options)
        value.backward()
        results.append((value.detach(), x.grad))
    (value, grad), (by_torch, grad_by_torch), (exact, exact_grad) = results
    assert value.dtype == by_torch.dtype
    assert_as_close_as_torch(value, exact, by_torch, V)
    assert_as_close_as_torch(grad, exact_grad, grad_by_torch, V)


class _Exact(torch.Tensor):
    """fp64 that `float()` leaves alone."""

    @staticmethod
    def of(x):
        return x.as_subclass(_Exact)

    def float(self):
        return self.as_subclass(torch.Tensor)


def test_a_loss_of_ones_own_stays():
    stock, _ = twins("llama")
    stock.loss_function = own = F.mse_loss
    fastlm.accelerate(stock)
    assert stock.loss_function is own
    fastlm.restore(stock)
    assert stock.loss_function is own
    stock, model = twins("llama")
    assert pickle.loads(pickle.dumps(model)).loss_function.args == (ForCausalLMLoss,)
    model.loss_function = own
    fastlm.restore(model)
    assert model.loss_function is own
    assert not any("loss" in row.kind for row in fastlm.accelerate(stock, loss=False).rows)
    assert stock.loss_function is ForCausalLMLoss
