"""``teacher``: the model that on-policy distillation learns from. Importing it needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_ads.config.generation import EndpointConfig, ModelKind
from megatron_ads.errors import require, require_above, require_at_least


@dataclass(kw_only=True, slots=True)  # not frozen: Hydra merges into it
class TeacherConfig(EndpointConfig):
    """A model that says how probable the policy's own answers are to it, token by token; ``model`` None: none does.

    It reads the very tokens of the policy, so its tokenizer must have them under the same ids.
    """

    kind: ModelKind = ModelKind.endpoint
    """``endpoint``: a server that reports log-probabilities of prompts, as vLLM does; ``local``: a checkpoint folder,
    which ``model`` names, run by transformers on rank 0 beside its part of the trainer."""
    kl_coef: float = 1.0
    """beta, what the token advantages log p_teacher - log p_student are multiplied by; slime's ``--opd-kl-coef``."""
    tokenizer: str | None = None
    """``endpoint``: folder of the served model's tokenizer, to be compared with the policy's."""
    batch_size: int = 16
    """``local``: answers that are read at once."""
    server_wait_seconds: float = 600.0
    """``endpoint``: how long the server may be away before the job ends."""

    @property
    def is_there(self) -> bool:
        """Whether anything is learned from a teacher."""
        return self.model is not None

    def check(self, section: str = "teacher") -> None:
        """Refuse impossible values, and values that have no effect; ``section`` is its name in the recipe."""
        if not self.is_there:
            every = [field.name for field in fields(self)]
            why = f"while {section}.model is null"
            self._require_defaults(section, every, why, remedy=f"Name the teacher by {section}.model, or remove it.")
            return
        self._check_limits(section)
        require_above(section, self, 0, "kl_coef", "server_wait_seconds")
        require_at_least(section, self, 1, "batch_size")
        self._require_defaults(section, ["template_arguments"], "on a teacher: it reads the prompts of the policy")
        if self.kind is ModelKind.local:
            of_servers = [field.name for field in fields(EndpointConfig) if field.name != "model"]
            names = [*of_servers, "tokenizer", "server_wait_seconds"]
            self._require_defaults(section, names, f"with {section}.kind local")
            return
        self._check_url(section)
        self._require_defaults(section, ["batch_size"], f"with {section}.kind endpoint")
        require(
            self.tokenizer is not None,
            f"{section}.tokenizer is null. Name the folder of the served model's tokenizer: it must give tokens the "
            "ids that the policy's gives them.",
        )

    def _require_defaults(self, section: str, names: Sequence[str], why: str, *, remedy: str = "Remove it.") -> None:
        defaults = TeacherConfig()
        for name in names:
            value = getattr(self, name)
            require(
                value == getattr(defaults, name),
                f"{section}.{name} is {value}, which has no effect {why}. {remedy}",
            )
