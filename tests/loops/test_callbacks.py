"""The callbacks of transformers and of Lightning, on tiny models."""

from __future__ import annotations

import sys
import warnings
from unittest import mock

import pytest
import torch
import transformers as tf
from torch import nn

import secateur as sc
from secateur._internal.importing import package
from secateur.loops.schedule import PruningSchedule
from secateur.loops.trainer import PruneCallback

# torchmetrics, which Lightning imports, looks at a torchvision that need not fit the PyTorch that is here
VISION = ("torchvision", "torchvision.models", "torchvision.transforms")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    before = {name: sys.modules.get(name, sys) for name in VISION}
    sys.modules.update(dict.fromkeys(VISION, mock.MagicMock()))
    import lightning.pytorch as pl

    from secateur.loops.lightning import PruneCallback as LightningCallback

    for name, module in before.items():
        if module is sys:
            del sys.modules[name]
        else:
            sys.modules[name] = module

IDS = torch.randint(3, 64, (24, 8), generator=torch.Generator().manual_seed(0))
GREG = {"name": "greg", "every": 1, "rate": 0.5, "limit": 1.0, "settle": 1}


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def logits(out):
    return out.logits


def trainer(model, schedule, tmp_path, epochs, **more):
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=epochs, per_device_train_batch_size=4, report_to=[],
        disable_tqdm=True, save_strategy="no", use_cpu=True, gradient_accumulation_steps=2, dataloader_pin_memory=False,
        logging_strategy="no", **more,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    return tf.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[PruneCallback(schedule)])


def test_the_trainer_of_transformers_prunes_after_an_epoch_and_ships(tmp_path):
    model = llama()
    batches = [{"input_ids": IDS[:4], "labels": IDS[:4]}]
    schedule = PruningSchedule(
        {"input_ids": IDS[:2]}, sc.Budget(params=0.7, alike=True, round_to=1), after=1, data=batches, outputs=logits,
        exclude=["model.embed_tokens"],
    )  # fmt: skip
    run = trainer(model, schedule, tmp_path, 2)
    run.train()
    assert run.model is model
    (cut,) = schedule.cuts
    assert (cut["step"], cut["epoch"]) == (3, 1)
    assert cut["params"] <= 0.7
    assert schedule.steps == 6
    done = sc.export(run.model, tmp_path / "small", {"input_ids": IDS[:2]}, to="hf")
    assert "intermediate_size" in done.facts["config"]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.num_parameters() == model.num_parameters()


def test_a_method_prunes_in_the_trainer_of_transformers(tmp_path):
    model = llama()
    schedule = PruningSchedule({"input_ids": IDS[:2]}, sc.Budget(params=0.8), method=GREG, outputs=logits)
    run = trainer(model, schedule, tmp_path, 20, learning_rate=1e-3)
    run.train()
    (cut,) = schedule.cuts
    assert cut["params"] <= 0.8
    assert cut["step"] < 60
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_what_would_undo_a_cut_is_refused(tmp_path):
    schedule = PruningSchedule({"input_ids": IDS[:2]}, sc.Budget(params=0.8), after=1, outputs=logits)
    more = {"load_best_model_at_end": True, "eval_strategy": "epoch"}
    run = trainer(llama(), schedule, tmp_path, 1)
    run.args.load_best_model_at_end = more["load_best_model_at_end"]
    with pytest.raises(sc.SecateurError, match="load_best_model_at_end"):
        run.train()
    for callback in (PruneCallback, LightningCallback):
        with pytest.raises(sc.SecateurError, match="a PruningSchedule is expected"):
            callback(sc.Budget(macs=0.5))


class Module(pl.LightningModule):
    """A module of Lightning with a schedule of the learning rate."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
        self.many = optimizers
        self.automatic_optimization = optimizers == 1

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        made = [torch.optim.AdamW(self.parameters(), 1e-2) for _ in range(self.many)]
        return (
            made
            if self.many > 1
            else {"optimizer": made[0], "lr_scheduler": torch.optim.lr_scheduler.StepLR(made[0], 1)}
        )


X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(X[i : i + 8], torch.arange(8) % 3) for i in range(0, 32, 8)]


def fitted(module, schedule, epochs, tmp_path, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers and logs
        run = pl.Trainer(
            max_epochs=epochs, callbacks=[LightningCallback(schedule)], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, **more,
        )  # fmt: skip
        run.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    return run


def test_the_trainer_of_lightning_prunes_after_epochs(tmp_path):
    module = Module()
    schedule = PruningSchedule(
        X[:2], sc.Budget(macs=0.4, round_to=1), after=[1, 2], data=BATCHES, loss="cross_entropy"
    )  # fmt: skip
    run = fitted(module, schedule, 3, tmp_path, accumulate_grad_batches=2)
    assert [(cut["epoch"], cut["step"]) for cut in schedule.cuts] == [(1, 2), (2, 4)]
    assert schedule.cuts[-1]["macs"] <= 0.4
    assert module.net[0].out_features < 32
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)  # the schedule went on


def test_a_method_prunes_in_the_trainer_of_lightning(tmp_path):
    module = Module()
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), method=GREG)
    fitted(module, schedule, 60, tmp_path)
    (cut,) = schedule.cuts
    assert cut["macs"] <= 0.5


def test_several_optimizers_are_refused(tmp_path):
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), after=1)
    with pytest.raises(sc.SecateurError, match="one optimizer is expected, this module has 2"):
        fitted(Module(2), schedule, 1, tmp_path)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nowhere", None)
    with pytest.raises(sc.SecateurError, match="me needs there, which is not installed; pip install there"):
        package("nowhere", "me", "there")
