"""State that all endpoints share: the settings, and the served model once it is ready."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hbserve.monitoring.live_view import Deployment, Watched
from hbserve.server.encoder import Encoder
from hbserve.server.fields.sampling import model_defaults
from hbserve.server.http.api_error import ApiError, try_again
from hbserve.server.http.http_figures import HttpFigures
from hbserve.server.spans import Spans
from hbserve.text.text_request import Scheduler
from hbserve.text.tokenizer import why_no_template
from hbserve_rpc.messages import SchedulerStats, ServiceInfo
from hbserve_rpc.plain_values import shown
from hbserve_scheduler import ConfigError, parse_size
from hbserve_scheduler.config import ServerSection
from hbserve_scheduler.figures import Figures

RESERVED_TEMPLATE_KWARGS = {
    "messages",
    "conversation",
    "chat_template",
    "tokenize",
    "return_dict",
    "return_tensors",
    "tools",
    "name",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
"""Arguments of `apply_chat_template` that a request cannot set by chat_template_kwargs, because the server sets them or
they have fields of their own. All others go to the template."""


class ServingScheduler(Scheduler, Protocol):
    """A scheduler in this process: CpuScheduler."""

    figures: Figures

    def require_room(self, priority: int = ...) -> None: ...

    def info(self) -> ServiceInfo: ...

    def may_serve(self) -> bool: ...

    def stats(self) -> SchedulerStats: ...


@dataclass(frozen=True)
class ServedModel:
    """A model that answers requests, under its names."""

    names: list[str]
    folder: str
    scheduler: ServingScheduler
    encoder: Encoder
    whole: Deployment
    """Source of the figures and records of all schedulers of the deployment; `scheduler` may be one of several."""
    watched: Watched
    """Views of `whole`, for the dashboard."""
    created: int
    """Unix time, in seconds, from which the model has been served."""
    defaults: dict[str, Any]
    """The model's own values of SamplingParams, for requests that do not set them."""
    spans: Spans | None = None

    def name_for(self, wanted: str | None) -> str:
        """Return the name that a request has given, or the first name if it has given none. The folder is accepted too:
        /v1/models shows it as the model's root, and `vllm bench serve` then asks for that.

        Raises:
            ApiError: (404) there is no such model.
        """
        if wanted is None or wanted in (*self.names, self.folder):
            return wanted or self.names[0]
        problem = f"the model {shown(wanted)} does not exist; there is {', '.join(self.names)}"
        raise ApiError(404, problem, param="model", code="model_not_found")

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together; 0 until an instance has reported it."""
        return self.scheduler.info().max_model_len

    def room_for(self, prompt: tuple[int, ...]) -> int:
        """Return the most tokens of an answer to a prompt. At least 1: the scheduler refuses prompts without room."""
        return max(1, self.max_model_len - len(prompt))


@dataclass
class Service:
    """The server's settings, and the model from when it is ready until the server ends."""

    settings: ServerSection
    model: ServedModel | None = None
    problem: str = "the model is being loaded"
    """Why there is no model, for clients."""
    draining: bool = False
    http: HttpFigures = field(default_factory=HttpFigures)
    spans: Spans | None = None
    """Spans of requests for OpenTelemetry; None: no collector is configured."""
    max_body_bytes: int = field(init=False)
    chat_template: str | None = field(init=False)
    """Chat template that replaces the model's; None: the model's is used."""

    def __post_init__(self) -> None:
        self.max_body_bytes = parse_size("server.max_body_size", self.settings.max_body_size)
        self.chat_template = _template(self.settings.chat_template)

    def require_model(self) -> ServedModel:
        """Return the model. Raises ApiError (503) if it is not ready yet, or the server is ending."""
        if self.model is None or self.draining:
            raise try_again("the server is ending" if self.draining else self.problem, code="not_ready")
        return self.model

    def template_settings(
        self, given: dict[str, Any] | None, *, begins_message: bool | None, goes_on: bool | None
    ) -> dict[str, Any]:
        """Return the variables of the chat template besides messages, tools and documents. A prompt ends with the
        beginning of an answer unless the request refuses that, or continues the last message.

        Raises:
            ApiError: (400) a request may not set a variable, which the message names.
        """
        given = given or {}
        if reserved := sorted(RESERVED_TEMPLATE_KWARGS & given.keys()):
            path = f"chat_template_kwargs.{reserved[0]}"
            raise ApiError(400, f"{path}={shown(given[reserved[0]])}: cannot be set there", param=path)
        if goes_on and begins_message:
            problem = "add_generation_prompt=True: not with continue_final_message, which begins no message"
            raise ApiError(400, problem, param="add_generation_prompt")
        begins = begins_message is not False and not goes_on
        settings = self.settings.default_chat_template_kwargs | given
        return settings | {"add_generation_prompt": begins, "continue_final_message": bool(goes_on)}

    def begin(
        self,
        name: str,
        folder: Path,
        scheduler: ServingScheduler,
        tokenizer: Any,
        whole: Deployment,
    ) -> None:
        """Serve a model from now on, under this name unless the settings have other names."""
        encoder = Encoder(tokenizer, self.chat_template)
        names = self.settings.served_model_names or [name]
        scheduler.figures.http = self.http.counts
        if self.spans is not None:
            scheduler.figures.on_record = self.spans.ended
        defaults = model_defaults(folder) if self.settings.generation_config == "auto" else {}
        self.model = ServedModel(
            names=names,
            folder=str(folder),
            scheduler=scheduler,
            encoder=encoder,
            whole=whole,
            watched=Watched(whole),
            created=int(time.time()),
            defaults=defaults,
            spans=self.spans,
        )

    def close(self) -> None:
        if self.spans is not None:
            self.spans.close()
        if self.model is not None:
            self.model.encoder.close()


def _template(given: str | None) -> str | None:
    """Return a chat template, which was given as text or as a file. Text with a brace is a template, because few names
    of files have one. Raises ConfigError."""
    if given is None:
        return None
    try:
        text = given if "{" in given else Path(os.path.expanduser(given)).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"server.chat_template={shown(given)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"server.chat_template={shown(given)}: {error}") from None
    if problem := why_no_template(text):
        raise ConfigError(f"server.chat_template={shown(given)}: {problem}")
    return text
