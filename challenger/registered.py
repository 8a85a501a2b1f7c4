"""Whether a model folder is the one that the chain knows: no stake is put on another."""

from __future__ import annotations

from challenger.config import ConfigError
from challenger.judge import Judge
from contracts.client import Chain
from contracts.events import ModelRegistered


class WrongModel(ConfigError):
    """A folder that is not what was registered; says both ids."""


def check_registered(chain: Chain, judge: Judge) -> None:
    """Raises WrongModel for a folder that no registered model has, ContractsError."""
    if chain.models.layers(judge.id) > 0:
        return
    registered = [event for event in chain.events(0) if isinstance(event, ModelRegistered)]
    ours, id = judge.model, judge.id.hex()
    for event in registered:
        theirs = event.model
        if (theirs.weights_root, theirs.program_root) == (ours.weights_root, ours.program_root):
            raise WrongModel(
                f"{judge.folder}: tolerance.json is not the registered one: expected a profile with root "
                f"0x{theirs.profile_root.hex()} (model 0x{event.id.hex()}), this one has 0x{ours.profile_root.hex()} "
                f"(model 0x{id}); fetch the pipeline's own file"
            )
    known = ", ".join(f"0x{event.id.hex()}" for event in registered) or "none"
    raise WrongModel(f"{judge.folder}: expected a registered model, one of {known}; this folder is 0x{id}")
