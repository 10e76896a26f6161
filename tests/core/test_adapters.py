"""The same hooks under transformers' Trainer and Lightning."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from laconic.core.adapters import hooked_module, hooked_trainer, lightning_callback, trainer_callback
from laconic.core.constraint import Constrain
from laconic.core.hooks import EarlyStop, Hook
from laconic.errors import BadInput
from tests.core.test_constraint import Sphere, rows
from tests.core.training import Points, weights


class Count(Hook):
    """What each moment sees; its state is the number of steps."""

    def __init__(self):
        self.steps, self.moments = 0, []

    def start(self, run):
        self.moments.append("start")

    def gradients(self, run):
        assert all(p.grad is not None for p in run.model.parameters())
        self.moments.append("gradients")

    def step(self, run):
        self.steps += 1
        self.moments.append(f"step {run.clock.step}")

    def epoch(self, run):
        self.moments.append(f"epoch {run.clock.epoch}")

    def end(self, run):
        self.moments.append("end")

    def state_dict(self):
        return {"steps": self.steps, "moments": self.moments}

    def load_state_dict(self, state):
        self.steps, self.moments = state["steps"], state["moments"]


class Decay(Hook):
    """A term of the loss, and a batch that is turned round."""

    def batch(self, run, batch):
        return {**batch, "x": -batch["x"]} if isinstance(batch, dict) else (-batch[0], batch[1])

    def loss(self, run, loss, batch, output):
        return loss + 0.1 * sum(p.pow(2).sum() for p in run.model.parameters())


EXPECTED = [
    "start", "gradients", "step 1", "gradients", "step 2", "epoch 1", "gradients", "step 3", "gradients", "step 4",
    "epoch 2", "end",
]  # fmt: skip


# ---------------------------------------------------------------- transformers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Points().model(0)

    def forward(self, x, labels):
        out = self.net(x)
        return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


class Rows(torch.utils.data.Dataset):
    def __init__(self, sign=1):
        task = Points(32)
        self.x, self.y = sign * task.x, task.y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


def trainer(tmp_path, hooks=(), callbacks=(), cls=None, sign=1, **more):
    from transformers import Trainer, TrainingArguments

    options = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "report_to": [],
        "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no", "lr_scheduler_type": "constant", "seed": 0,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(tmp_path), **(options | more))
    given = {"hooks": hooks} if cls is not None else {}
    return (cls or Trainer)(
        model=Net(), args=args, train_dataset=Rows(sign), eval_dataset=Rows(sign), callbacks=list(callbacks), **given
    )


def test_trainer_callback(tmp_path):
    count, sphere = Count(), Constrain(Sphere(), lambda name, p: name == "net.0.weight")
    found = trainer(tmp_path, callbacks=[trainer_callback([count, sphere])])
    found.train()
    assert count.moments == EXPECTED
    torch.testing.assert_close(rows(found.model.net[0].weight), torch.ones(16))


def test_trainer_takes_batch_and_loss_from_hooks(tmp_path):
    hooked = trainer(tmp_path, [Decay()], cls=hooked_trainer())
    hooked.train()

    class ByHand(Net):
        def forward(self, x, labels):
            found = super().forward(x, labels)
            found["loss"] = found["loss"] + 0.1 * sum(p.pow(2).sum() for p in self.parameters())
            return found

    plain = trainer(tmp_path, sign=-1)
    plain.model = plain.model_wrapped = ByHand()
    plain.train()
    torch.testing.assert_close(weights(hooked.model), weights(plain.model))


def test_trainer_resumes_the_hooks(tmp_path):
    straight = trainer(tmp_path / "a", hooks := [Count()], cls=hooked_trainer())
    straight.train()
    first = trainer(tmp_path / "b", [Count()], cls=hooked_trainer(), max_steps=4, save_strategy="steps", save_steps=1)
    first.train()
    count = Count()
    second = trainer(tmp_path / "b", [count], cls=hooked_trainer(), max_steps=4)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert count.steps == hooks[0].steps == 4
    torch.testing.assert_close(weights(second.model), weights(straight.model), rtol=0, atol=0)
    third = trainer(tmp_path / "b", [EarlyStop()], cls=hooked_trainer(), max_steps=4)
    with pytest.raises(BadInput, match=r"is of the hooks \['Count'\], these are \['EarlyStop'\]"):
        third.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))


def test_trainer_stops_early(tmp_path):
    found = trainer(
        tmp_path, [EarlyStop(1, min_delta=9.0)], cls=hooked_trainer(), num_train_epochs=9, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    found.train()
    assert found.state.global_step == 2


# ---------------------------------------------------------------- Lightning


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request):
    found = pytest.importorskip(request.param)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return found


def module(lightning, decay=0.0):
    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Points().model(0)

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            return loss + decay * sum(p.pow(2).sum() for p in self.parameters()) if decay else loss

        def validation_step(self, batch, batch_idx):
            self.log("val", 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Lit


def loader(sign=1):
    task = Points(32)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(sign * task.x, task.y), 8)


def lit_trainer(lightning, tmp_path, **more):
    options = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": 2,
        "default_root_dir": str(tmp_path),
    }  # fmt: skip
    return lightning.Trainer(**(options | more))


@pytest.mark.filterwarnings("ignore")
def test_lightning_callback(lightning, tmp_path):
    count, sphere = Count(), Constrain(Sphere(), lambda name, p: name == "net.0.weight")
    model = module(lightning)()
    callback = lightning_callback([count, sphere], package=lightning.__name__)
    lit_trainer(lightning, tmp_path, callbacks=[callback]).fit(model, loader())
    assert count.moments == EXPECTED
    torch.testing.assert_close(rows(model.net[0].weight), torch.ones(16))


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_batch_and_loss_from_hooks(lightning, tmp_path):
    hooked = hooked_module(module(lightning), [Decay()])()
    lit_trainer(lightning, tmp_path).fit(hooked, loader())
    plain = module(lightning, decay=0.1)()
    lit_trainer(lightning, tmp_path).fit(plain, loader(-1))
    torch.testing.assert_close(weights(hooked), weights(plain))


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_the_hooks_and_stops_early(lightning, tmp_path):
    first = lit_trainer(lightning, tmp_path, max_epochs=1)
    first.fit(hooked_module(module(lightning), [Count()])(), loader())
    first.save_checkpoint(tmp_path / "x.ckpt")
    count = Count()
    second = lit_trainer(lightning, tmp_path)
    second.fit(hooked_module(module(lightning), [count])(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert count.steps == 4
    stopped = lit_trainer(lightning, tmp_path, max_epochs=9, num_sanity_val_steps=0)
    cls = hooked_module(module(lightning), [EarlyStop(2)], monitor="val")
    stopped.fit(cls(), loader(), loader())
    assert stopped.current_epoch == 3


def test_callbacks_refuse_what_they_cannot_do():
    with pytest.raises(BadInput, match="Decay changes the batch, which a callback cannot; use hooked_trainer"):
        trainer_callback([Decay()])
    pytest.importorskip("lightning")
    with pytest.raises(BadInput, match="use hooked_module"):
        lightning_callback([Decay()])
    with pytest.raises(BadInput, match="Linear is no LightningModule"):
        hooked_module(nn.Linear, [])
