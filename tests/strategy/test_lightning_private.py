"""Every private name of Lightning that the package touches is there, is called as it was, and is touched in one file.

When Lightning changes one, the first test says which: its parameter is the name.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch import nn

import lightning_cpipe
from lightning_cpipe.strategy.lightning_private import (
    as_of,
    attach_for_training,
    callbacks_of,
    evaluation_arguments,
    has_transfer_hooks,
    instead_of,
    known_metrics,
    learn_metrics,
    loaders_as,
    prepare_batch,
    set_received_sigterm,
    take_over_signals,
    training_arguments,
    updates_after_this_batch,
    with_column,
)
from lightning_cpipe.strategy.loops import install_loops
from tests.helpers.fits import quiet_trainer
from tests.helpers.modules import Chain, noise_loader

PACKAGE = Path(lightning_cpipe.__file__).parent
THE_FILE = PACKAGE / "strategy" / "lightning_private.py"

# Where it is, and the parameters it is called with; None for what is not called, such as a class or an attribute.
# `trainer` is a Trainer that is attached to `module`.
PRIVATE: dict[str, tuple[str, ...] | None] = {
    "lightning.fabric.utilities.data._auto_add_worker_init_fn": ("dataloader", "rank"),
    "lightning.fabric.utilities.data._set_sampler_epoch": ("dataloader", "epoch"),
    "lightning.fabric.utilities.distributed._get_default_process_group_backend_for_device": ("device",),
    "lightning.fabric.utilities.distributed._all_gather_ddp_if_available": ("tensor", "group", "sync_grads"),
    "lightning.fabric.utilities.distributed._init_dist_connection": (
        "cluster_environment",
        "torch_distributed_backend",
        "global_rank",
        "world_size",
        "kwargs",
    ),
    "lightning.fabric.utilities.distributed._set_num_threads_if_needed": ("num_processes",),
    "lightning.fabric.utilities.optimizer._optimizers_to_device": ("optimizers", "device"),
    "lightning.fabric.utilities.types._PATH": None,
    "lightning.pytorch.callbacks.ModelCheckpoint()._link_checkpoint": ("trainer", "filepath", "linkpath"),
    "lightning.pytorch.callbacks.ModelCheckpoint()._save_checkpoint": ("trainer", "filepath"),
    "lightning.pytorch.callbacks.ModelSummary()._summary": ("trainer", "pl_module"),
    "lightning.pytorch.callbacks.StochasticWeightAveraging(0.1)._average_model": None,
    "lightning.pytorch.callbacks.StochasticWeightAveraging(0.1)._clear_schedulers": ("trainer",),
    "lightning.pytorch.callbacks.StochasticWeightAveraging(0.1)._scheduler_state": None,
    "lightning.pytorch.callbacks.ThroughputMonitor(len)._throughputs": None,
    "lightning.pytorch.callbacks.WeightAveraging()._average_model": None,
    "lightning.pytorch.utilities.model_summary.ModelSummary(module)._get_summary_data": (),
    "lightning.pytorch.loops.fetchers._DataFetcher": None,
    "lightning.pytorch.loops.fetchers._DataFetcher()._start_profiler": (),
    "lightning.pytorch.loops.fetchers._DataFetcher()._stop_profiler": (),
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop": None,
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop._is_sequential": None,
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop._store_dataloader_outputs": ("self",),
    "lightning.pytorch.loops.evaluation_loop._EvaluationLoop._on_evaluation_end": ("self", "args", "kwargs"),
    "lightning.pytorch.loops.fit_loop._FitLoop": None,
    "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization": None,
    "lightning.pytorch.loops.prediction_loop._PredictionLoop": None,
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop": None,
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor": ("self",),
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._should_check_val_fx": ("self", "data_fetcher"),
    "lightning.pytorch.strategies.launchers.multiprocessing._MultiProcessingLauncher": None,
    "lightning.pytorch.strategies.launchers.multiprocessing._MultiProcessingLauncher._wrapping_function": (
        "self",
        "process_idx",
        "trainer",
        "function",
        "args",
        "kwargs",
        "return_queue",
        "global_states",
    ),
    "lightning.pytorch.strategies.launchers.multiprocessing._MultiProcessingLauncher('here')._strategy": None,
    "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher": None,
    "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher._call_children_scripts": (
        "self",
    ),
    "lightning.pytorch.profilers.PyTorchProfiler()._register": None,
    "lightning.pytorch.profilers.pytorch.RegisterRecordFunction(module)._records": None,
    "lightning.pytorch.strategies.DDPStrategy()._layer_sync": None,
    "lightning.pytorch.trainer.connectors.logger_connector.result._distributed_is_initialized": (),
    "lightning.pytorch.trainer.connectors.logger_connector.result._Metadata": None,
    "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric": ("metadata", "is_tensor"),
    "lightning.pytorch.trainer.connectors.logger_connector.result._Sync": (
        "fn",
        "_should",
        "rank_zero_only",
        "_op",
        "_group",
    ),
    "lightning.pytorch.utilities.exceptions._TunerExitException": None,
    "module._apply_batch_transfer_handler": ("batch", "device", "dataloader_idx"),
    "module._current_fx_name": None,
    "module._example_input_array": None,
    "module._on_before_batch_transfer": ("batch", "dataloader_idx"),
    "trainer._data_connector": None,
    "trainer._data_connector.attach_data": (
        "model",
        "train_dataloaders",
        "val_dataloaders",
        "test_dataloaders",
        "predict_dataloaders",
        "datamodule",
    ),
    "trainer._logger_connector": None,
    "trainer._logger_connector._callback_metrics": None,
    "trainer._logger_connector._logged_metrics": None,
    "trainer._signal_connector": None,
    "trainer._signal_connector._sigterm_notifier_fn": ("signum", "_"),
    "trainer._signal_connector._slurm_sigusr_handler_fn": ("signum", "_"),
    "trainer._signal_connector.received_sigterm": None,
    "trainer._val_check_time_interval": None,
    "lightning.pytorch.utilities.CombinedLoader([])._load_state_dicts": ("states",),
    "lightning.pytorch.utilities.CombinedLoader([])._state_dicts": (),
    "trainer.fit_loop._combined_loader": None,
    "trainer.fit_loop._data_fetcher": None,
    "trainer.fit_loop._data_source.dataloader": (),
    "trainer.fit_loop._last_train_dl_reload_epoch": None,
    "trainer.fit_loop._load_combined_loader_states": (),
    "trainer.fit_loop.epoch_loop._results.batch": None,
    "trainer.fit_loop.epoch_loop._results.batch_size": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss']._computed": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss']._defaults": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss']._forward_cache": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss']._update_count": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss'].has_reset": None,
    "trainer.fit_loop.epoch_loop._results._forked_name": ("result_metric", "on_step"),
    "trainer._logger_connector._first_loop_iter": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss'].is_tensor": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss'].meta.fx": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss'].meta.reduce_fx.__name__": None,
    "trainer.fit_loop.epoch_loop._results['training_step.loss'].meta.sync.should": None,
    "trainer.fit_loop._should_accumulate": (),
    "trainer.fit_loop.epoch_loop._build_kwargs": ("kwargs", "batch", "batch_idx"),
    "trainer.predict_loop._build_kwargs": ("batch", "batch_idx", "dataloader_idx"),
    "trainer.predict_loop._build_step_args_from_hook_kwargs": ("hook_kwargs", "step_hook_name"),
    "trainer.predict_loop._combined_loader": None,
    "trainer.predict_loop._data_source.dataloader": (),
    "trainer.strategy._configure_launcher": (),
    "trainer.strategy._launcher": None,
    "trainer.validate_loop._build_kwargs": ("batch", "batch_idx", "dataloader_idx"),
    "trainer.validate_loop._build_step_args_from_hook_kwargs": ("hook_kwargs", "step_hook_name"),
    "trainer.validate_loop._combined_loader": None,
    "trainer.validate_loop._logged_outputs": None,
}

# Private names that other files touch.
ELSEWHERE = {
    # A strategy of one's own overrides and fills these; Lightning calls the first one.
    ("strategy/strategy.py", "_configure_launcher"),
    ("strategy/strategy.py", "_launcher"),
    ("strategy/strategy.py", "_layer_sync"),
    ("strategy/strategy.py", "_PATH"),
    # What a subclass of a class in `lightning_private` inherits.
    ("strategy/data/fetcher.py", "_start_profiler"),
    ("strategy/data/fetcher.py", "_stop_profiler"),
    ("strategy/data/hearsay.py", "_load_state_dicts"),
    ("strategy/ranks/launchers.py", "_strategy"),
    # Attributes of a LightningModule, by their names.
    ("strategy/hooks.py", "_example_input_array"),
}


def attached() -> dict[str, Any]:
    """What the paths above begin with."""
    trainer, module = quiet_trainer(devices=1), Chain()
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.fit_loop.epoch_loop._results.log("training_step", "loss", torch.tensor(1.0), on_step=True)
    return {"lightning": lightning, "trainer": trainer, "module": module}


def what_changed(path: str, parameters: tuple[str, ...] | None) -> str | None:
    """What is different about a private name; None if nothing is."""
    where = re.match(r"lightning\.[a-z_.]*(?=\._|\.[A-Z])", path)
    if where is not None:
        importlib.import_module(where[0])
    try:
        found = eval(path, attached())
    except AttributeError as error:
        return f"Lightning {lightning.__version__} has no {path}: {error}"
    if parameters is None:
        return None
    takes = tuple(inspect.signature(found).parameters)
    return None if takes == parameters else f"{path} takes {takes}, where {parameters} is written down"


@pytest.mark.parametrize("path", PRIVATE)
def test_lightning_has_not_changed(path: str) -> None:
    changed = what_changed(path, PRIVATE[path])
    assert changed is None, f"{changed}: read what became of it, and change `strategy/lightning_private.py`."


def test_a_change_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would say nothing."""
    monkeypatch.delattr(_FitLoop, "_should_accumulate")
    monkeypatch.setattr(_EvaluationLoop, "_build_kwargs", lambda self, batch: {})
    gone = what_changed("trainer.fit_loop._should_accumulate", ())
    assert gone is not None
    assert "has no trainer.fit_loop._should_accumulate" in gone
    path = "trainer.validate_loop._build_kwargs"
    other = what_changed(path, PRIVATE[path])
    assert other is not None
    assert f"{path} takes ('batch',)" in other


def touched(file: Path) -> set[str]:
    """The private names of Lightning that a file of the package touches.

    - What it imports from Lightning, or from a private module of it.
    - What a class with ancestors in Lightning shares with them.
    - A private attribute of any object that is neither `self` nor one of this package's, of torch's or of Python's.
    - A private attribute of a LightningModule that is named by a string.
    """
    tree = ast.parse(file.read_text())
    return {*_imported(tree), *_inherited(file), *_of_objects(tree), *_by_string(tree)}


def _is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0].startswith("lightning"):
            if (node.module or "").split(".")[0] == "lightning_cpipe":
                continue
            yield from filter(_is_private, (*(node.module or "").split("."), *(alias.name for alias in node.names)))
        elif isinstance(node, ast.Import):
            yield from (part for each in node.names for part in each.name.split(".") if _is_private(part))


def _inherited(file: Path) -> Iterator[str]:
    for cls in _classes_of(file):
        theirs = {name for base in cls.__mro__ if _is_lightnings(base) for name in _private_names_of(base)}
        yield from theirs & _private_names_of(cls)


def _classes_of(file: Path) -> list[type]:
    name = ".".join(("lightning_cpipe", *file.relative_to(PACKAGE).with_suffix("").parts))
    module = importlib.import_module(name.removesuffix(".__init__"))
    return [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]


def _is_lightnings(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "lightning"


@functools.cache
def _private_names_of(cls: type) -> set[str]:
    """The private names that a class's source defines, or reads from or writes to `self` and `super()`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    of_self = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    return set(filter(_is_private, of_self | set(vars(cls)))) - {"_abc_impl"}


def _of_objects(tree: ast.AST) -> Iterator[str]:
    known = set(dir(nn.Module()) + dir(torch.Tensor) + dir(torch.optim.SGD([torch.zeros(1)]))) | {
        "_replace",
        "_exit",
        "_schema",
    }
    known |= {"_schema"} | _own_names()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in known:
            root = ast.unparse(node.value).split(".")[0].split("(")[0]
            if root not in ("self", "cls", "super", "torch", "pytree"):
                yield node.attr


@functools.cache
def _own_names() -> set[str]:
    """Private names that the package's own classes define."""
    trees = [ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py") if file != THE_FILE]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _by_string(tree: ast.AST) -> Iterator[str]:
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    yield from (each for each in strings if isinstance(each, str) and _is_private(each) and each in _of_modules())


@functools.cache
def _of_modules() -> set[str]:
    """What a LightningModule has beyond torch's."""
    return set(dir(Chain())) - set(dir(nn.Module()))


def test_no_other_file_touches_a_private_name() -> None:
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file not in (THE_FILE, PACKAGE / "__main__.py")]
    found = {(str(file.relative_to(PACKAGE)), name) for file in files for name in touched(file)}
    assert found == ELSEWHERE


def test_every_name_that_the_file_touches_is_written_down_above() -> None:
    names = touched(THE_FILE)
    known = {part for path in PRIVATE for part in re.split(r"\W+", path)}
    assert {"_combined_loader", "_should_accumulate", "_FitLoop", "_store_dataloader_outputs"} <= names
    assert names - known == set()
    assert {name for _, name in ELSEWHERE} - known == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from lightning.pytorch.loops.fit_loop import _FitLoop", {"_FitLoop"}),
        ("from lightning.pytorch._graveyard import anything", {"_graveyard"}),
        ("def f(trainer):\n    trainer._run_stage()", {"_run_stage"}),
        ("def f(a):\n    a.trainer.fit_loop._warn_if_modules_in_eval_mode()", {"_warn_if_modules_in_eval_mode"}),
        ("getattr(module, '_trainer', None)", {"_trainer"}),
        ("from lightning_cpipe.transport.edge import _Message", set()),
        ("def f(x, module):\n    return x._version, module._buffers, torch._C, other._replace(a=1)", set()),
    ],
)
def test_the_scan_finds_what_it_should(source: str, expected: set[str]) -> None:
    tree = ast.parse(source)
    assert {*_imported(tree), *_of_objects(tree), *_by_string(tree)} == expected


def test_every_module_of_the_package_is_scanned() -> None:
    found = {
        each.name for each in pkgutil.walk_packages(lightning_cpipe.__path__, "lightning_cpipe.") if not each.ispkg
    }
    files = {
        ".".join(("lightning_cpipe", *file.relative_to(PACKAGE).with_suffix("").parts))
        for file in PACKAGE.rglob("*.py")
    }
    assert found <= files


# What the functions do with these names.


class Watched:
    """Stands for the strategy where loops are installed."""


def test_loops_take_over_the_state_of_lightnings_and_their_places_in_a_checkpoint() -> None:
    trainer: Any = attached()["trainer"]
    trainer.fit_loop.epoch_progress.current.completed = 3
    names = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
    before = {name: getattr(trainer, name).state_dict() for name in names}
    states = {name: dict(vars(getattr(trainer, name))) for name in names}
    install_loops(trainer, Watched())  # type: ignore[arg-type]
    once = {name: getattr(trainer, name) for name in names}
    install_loops(trainer, Watched())  # type: ignore[arg-type]
    for name in names:
        assert getattr(trainer, name) is once[name], "a second time changes nothing"
        assert type(once[name]).__name__.startswith("Pipeline")
        assert once[name].state_dict().keys() == before[name].keys()
        assert vars(once[name]).keys() >= states[name].keys()
    assert trainer.current_epoch == 3


class WithoutIndex(Chain):
    def training_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
        return self.loss(batch)

    def predict_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
        return self(batch[0])


@pytest.mark.parametrize(("module", "expected"), [(Chain, ("batch", 4)), (WithoutIndex, ("batch",))])
def test_steps_get_the_arguments_that_they_take(module: type[Chain], expected: tuple[Any, ...]) -> None:
    trainer, made = quiet_trainer(devices=1, limit_predict_batches=1), module()
    found = []

    class Look(pl.Callback):
        def on_predict_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            found.append(evaluation_arguments(trainer.predict_loop, "predict_step", "batch", 4))

    trainer.callbacks.append(Look())  # type: ignore[attr-defined]
    trainer.predict(made, noise_loader())
    assert training_arguments(trainer, "batch", 4) == expected
    assert found == [expected]


def test_several_loaders_give_an_evaluation_its_loaders_number() -> None:
    found = []

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            found.append(evaluation_arguments(trainer.validate_loop, "validation_step", "batch", 4))

    class Several(Chain):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
            pass

    trainer = quiet_trainer(devices=1, limit_val_batches=1, callbacks=[Look()])
    trainer.validate(Several(), [noise_loader(), noise_loader()], verbose=False)
    assert found[0] == ("batch", 4, 0)


class MovesItsOwnWay(Chain):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [*batch, "before"]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [*batch, str(device)]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [*batch, "after"]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert batch[2:] == ["before", "cpu", "after"]
        assert has_transfer_hooks(self.trainer)
        assert prepare_batch(self, ["batch"], torch.device("cpu")) == ["batch", "before", "cpu", "after"]
        return self.loss(batch[:2])


def test_a_batch_is_prepared_by_the_modules_own_hooks() -> None:
    assert not has_transfer_hooks(attached()["trainer"])
    trainer = quiet_trainer(devices=1, fast_dev_run=True)
    trainer.fit(MovesItsOwnWay(), noise_loader())
    assert trainer.global_step == 1


def test_a_module_can_be_attached_without_a_fit() -> None:
    trainer, module = quiet_trainer(devices=1), MovesItsOwnWay()
    attach_for_training(trainer, module)
    assert module.trainer is trainer
    assert trainer.lightning_module is module
    assert trainer.training
    assert prepare_batch(module, ["batch"], torch.device("cpu")) == ["batch", "before", "cpu", "after"]


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [True] * 8), (3, [False, False, True] * 2 + [False, True])])
def test_an_update_follows_where_lightning_steps(accumulate: int, expected: list[bool]) -> None:
    found = []

    class Asking(Chain):
        def on_after_backward(self) -> None:
            found.append(updates_after_this_batch(self.trainer))

    trainer = quiet_trainer(devices=1, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(Asking(), noise_loader())
    assert found == expected


def test_metrics_that_are_learnt_are_seen_and_kept() -> None:
    trainer = attached()["trainer"]
    learn_metrics(trainer, {"val_loss": torch.tensor(1.0)}, {"lr": torch.tensor(2.0)})
    assert trainer.callback_metrics["val_loss"] == 1.0
    assert trainer.logged_metrics["lr"] == 2.0
    callback, logged = known_metrics(trainer)
    assert (set(callback), set(logged)) == ({"val_loss"}, {"lr"})


def test_inside_as_of_the_epoch_is_another_one() -> None:
    trainer = attached()["trainer"]
    with as_of(trainer, 5):
        assert trainer.current_epoch == 5
    assert trainer.current_epoch == 0


def test_a_sigterm_is_ours_and_goes_to_the_children() -> None:
    trainer = attached()["trainer"]
    seen: list[Any] = []

    class Launcher:
        def kill(self, signum: int) -> None:
            seen.append(signum)

    trainer.strategy._launcher = Launcher()
    take_over_signals(trainer, lambda: seen.append("received"), lambda: seen.append("requeue"))
    connector = trainer._signal_connector
    connector.register_signal_handlers()
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        connector.teardown()
    assert seen == [signal.SIGTERM, "received"]
    connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)
    assert seen.pop() == "requeue"
    assert not trainer.received_sigterm
    for received in (True, False):
        set_received_sigterm(trainer, received)
        assert trainer.received_sigterm is received


def test_what_stands_instead_of_a_method_can_be_taken_away() -> None:
    module: Any = Chain()
    module.extra_state_of_the_test = "own"
    undo = [instead_of(module, name, lambda: "other") for name in ("configure_optimizers", "extra_state_of_the_test")]
    assert module.configure_optimizers() == module.extra_state_of_the_test() == "other"
    for each in undo:
        each()
    assert isinstance(module.configure_optimizers(), torch.optim.Optimizer)
    assert module.extra_state_of_the_test == "own"
    assert "configure_optimizers" not in vars(module)


def test_a_summary_has_one_more_column_until_it_is_undone() -> None:
    callback = ModelSummary()
    undo = with_column(callback, "Length", lambda names: [str(len(name)) for name in names])
    columns = callback._summary(**_of_summary())._get_summary_data()
    assert [name for name, _ in columns][1:5] == ["Name", "Type", "Params", "Length"]
    assert dict(columns)["Length"] == ["3"]
    for each in undo:
        each()
    assert "Length" not in dict(callback._summary(**_of_summary())._get_summary_data())
    assert not {"_summary", "summarize"} & vars(callback).keys()


def _of_summary() -> dict[str, Any]:
    given = attached()
    return {"trainer": given["trainer"], "pl_module": given["module"]}


def test_a_loop_gets_what_is_made_of_its_loaders_while_it_asks_for_them() -> None:
    trainer = quiet_trainer(devices=1)
    attach_for_training(trainer, module := Chain())
    loader = noise_loader()
    trainer.fit_loop._data_source.instance = module
    module.train_dataloader = lambda: loader  # type: ignore[method-assign]
    made: list[Any] = []
    with loaders_as(trainer.fit_loop, lambda found: made.append(found) or found, "min_size"):
        trainer.fit_loop.setup_data()
    assert trainer.fit_loop._combined_loader is made[0]
    assert made[0].flattened == [loader]
    assert made[0]._mode == "min_size"
    assert trainer.fit_loop._data_source.dataloader() is loader


def test_callbacks_are_the_trainers() -> None:
    trainer = attached()["trainer"]
    assert callbacks_of(trainer) is trainer.callbacks
