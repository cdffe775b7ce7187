"""`Engine`: answers requests that come and go, each with its own adapter."""

import atexit
import concurrent.futures
import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tokenizers import Tokenizer

from jax_lora.bank import AdapterBank
from jax_lora.messages import printable, shown
from jax_lora.models.llama import Llama
from jax_lora.models.pages import Pages, lacks_in_place
from jax_lora.models.parallel import placements
from jax_lora.process import check_process
from jax_lora.serving.engine.adapters import AdapterDesk, AdapterLimits, Source, named
from jax_lora.serving.engine.requests import (
    EngineBusyError,
    FinishReason,
    Generation,
    Piece,
    Request,
    SamplingParams,
)
from jax_lora.serving.engine.schedule import Plan, Scheduler
from jax_lora.serving.engine.shape import StepShape
from jax_lora.serving.engine.step import Form, Inputs, Outputs, compiled_step, no_work
from jax_lora.serving.engine.text import TextStream
from jax_lora.serving.live import LiveModel
from jax_lora.serving.text import encode

_MAX_TOKENS = 64  # where a request does not say


class _Launched(NamedTuple):
    plan: Plan
    outputs: Outputs


class Stepper:
    """The device's side: the arrays, and the compiled steps that change them."""

    def __init__(
        self,
        model: Llama,
        bank: AdapterBank | None,
        shape: StepShape,
        *,
        in_place: bool | None = None,
    ) -> None:
        """`shape` is resolved. `in_place`: as in `Form`; None for the faster."""
        assert shape.blocks is not None and shape.max_length is not None
        self._shape, self._vocabulary = shape, model.config.vocab_size
        self._live = LiveModel(model)
        ranges = None if bank is None else tuple(bank.slots.items())
        guard = None if bank is None else self._live.guard
        dtype = model.model.embed_tokens.embedding.dtype
        if in_place is None:
            in_place = self._live.is_on_one_device and not lacks_in_place(
                model.config, shape.rows, shape.block, dtype
            )
        self._form = Form(ranges, guard, shape.max_length, shape.prompt_logprobs, in_place)
        heads, whole = placements(self._live.mesh)
        self._pages = Pages.empty(model.config, shape.blocks, shape.block, dtype, heads)
        self._last: Array = jnp.zeros(shape.rows, jnp.int32, device=whole)

    @property
    def in_place(self) -> bool:
        """Whether a kernel reads the blocks of decoding rows."""
        return self._form.in_place

    def warm_up(self) -> None:
        """Compiles all steps, and runs each once, for nobody."""
        rows, chunk = self._shape.rows, self._shape.chunk
        steps = [
            no_work(rows, lanes, chunk, blocks, self._vocabulary)
            for lanes, blocks in self._shape.forms
        ]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            # JAX lowers in Python. Meanwhile XLA compiles, in other threads, what is lowered.
            started = [pool.submit(self._lowered(inputs).compile) for inputs in steps]
            for compiling in started:
                compiling.result()
        for inputs in steps:
            self.run(inputs)
        jax.block_until_ready(self._last)

    def _lowered(self, inputs: Inputs[np.ndarray]) -> jax.stages.Lowered:
        """The program that `run` runs; it finds in JAX's caches what this one has compiled."""
        lower = functools.partial(_lower, self._form)
        return self._live.call(lower, self._pages, self._last, inputs)

    def run(self, inputs: Inputs[np.ndarray]) -> Outputs:
        """Launches a step behind those before it."""
        step = functools.partial(_call, self._form)
        self._pages, outputs = self._live.call(step, self._pages, self._last, inputs)
        self._last = outputs.tokens
        for array in jax.tree.leaves(outputs):
            array.copy_to_host_async()
        return outputs


def _lower(form: Form, structure: object, leaves: object, *args: object) -> jax.stages.Lowered:
    return compiled_step().lower(structure, form, leaves, *args)


def _call(form: Form, structure: object, leaves: object, *args: object) -> tuple[Pages, Outputs]:
    return compiled_step()(structure, form, leaves, *args)


class Loop:
    """The host's side, turn by turn: messages of other threads, a step, and the results before.

    A step is launched before the results of the one before it are looked at, so that the device
    has something to do meanwhile. Where a request ends, one step more has been launched for it.
    """

    def __init__(self, stepper: Stepper, scheduler: Scheduler) -> None:
        self.scheduler, self._stepper = scheduler, stepper
        self._launched: _Launched | None = None
        self.steps = 0

    def turn(self) -> bool:
        """False if there was nothing to do."""
        self.scheduler.admit()
        plan, before = self.scheduler.plan(), self._launched
        self._launched = None if plan is None else _Launched(plan, self._stepper.run(plan.inputs))
        self.steps += plan is not None
        if before is not None:
            self._deliver(before)
        return plan is not None or before is not None

    def _deliver(self, launched: _Launched) -> None:
        plan, outputs = launched
        if outputs.prompt_logprobs is not None and plan.lanes:
            self._deliver_prompts(plan, np.asarray(outputs.prompt_logprobs))
        tokens, logprobs = np.asarray(outputs.tokens).tolist(), np.asarray(outputs.logprobs)
        are_finite = np.asarray(outputs.are_finite)
        for row, request in plan.choosers.items():
            if request.has_ended:
                continue
            if not are_finite[row]:
                who = "the model" if request.adapter is None else f"adapter {request.adapter!r}"
                self.scheduler.fail(request, f"{who} gives logits that are NaN or infinite")
            else:
                self._accept(request, tokens[row], float(logprobs[row]))

    def _accept(self, request: Request, token: int, logprob: float) -> None:
        try:
            reason = request.accept(token, logprob)
        except Exception as error:  # of the request's own tokenizer or callback
            why = printable(f"taking a token failed: {type(error).__name__}: {error}", 1000)
            self.scheduler.fail(request, why)
        else:
            if reason is not None:
                self.scheduler.end(request, reason)

    def _deliver_prompts(self, plan: Plan, logprobs: np.ndarray) -> None:
        for lane, (request, start, count) in enumerate(plan.lanes):
            if request.params.prompt_logprobs and not request.has_ended:
                known = min(count, len(request.prompt) - 1 - start)  # the last token has no target
                request.prompt_logprobs.extend(logprobs[lane, :known].tolist())


class Engine:
    """Answers requests for a model and its adapters, as many at a time as have room.

    Requests join and leave at any step. A step takes one token of each request that decodes and
    some tokens of the prompts of others. Nothing compiles after `warmup`, whatever comes.

    Adapters that are not in a slot are read and uploaded while others run. Where more are wanted
    than there are slots, they take turns in the order of their requests. A request keeps the
    adapter with which it began, also where that is replaced.

    In one compiled step a request's tokens and log-probabilities are equal to the bit, whatever
    else the step does. `StepShape(lanes=(n,), contexts=(max_length,))` makes all steps one.

    Example::

        apply_lora(model, slots=8, buckets=(16, 64))
        with Engine(model, AdapterBank(model), tokenizer, adapters={"french": "adapters/fr"}) as e:
            e.warmup()
            for piece in e.submit("Good morning", adapter="french"):
                print(piece.text, end="")

    Its methods are for any thread. One of its own runs the steps, from the first request on. The
    bank may be used meanwhile: what is loaded there under a name, requests may ask for.

    Args:
      model: a `Llama`; with LoRA layers or without.
      bank: of the model; None if it has no LoRA layers.
      tokenizer: for prompts that are text, and for texts of answers.
      adapters: see `add_adapter`.
      shape: sizes of the steps.
      limits: for adapters.
      max_waiting: requests that may wait.

    Raises:
      TypeError, ValueError: the shape does not fit the model, an adapter is malformed, or there are
        adapters and no bank.
      RuntimeError: this process was forked from one that had used JAX.
    """

    def __init__(
        self,
        model: Llama,
        bank: AdapterBank | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        adapters: Mapping[str, Source] | None = None,
        shape: StepShape | None = None,
        limits: AdapterLimits | None = None,
        max_waiting: int = 1024,
    ) -> None:
        check_process()
        self.config, self.bank, self.tokenizer = model.config, bank, tokenizer
        self.shape = (shape or StepShape()).resolved(model.config)
        self.max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows
        self._arrivals, self._num_open = itertools.count(), 0
        self._thread: threading.Thread | None = None
        self._end: str | None = None  # why nothing comes any more
        self._error: Exception | None = None
        self._desk: AdapterDesk | None = None
        if bank is not None:
            limits = limits or AdapterLimits()
            self._desk = AdapterDesk(bank, limits, self._inbox.put, self._fail_waiting)
        elif adapters:
            raise ValueError("adapters need the bank of a model with LoRA layers")
        self._stepper = Stepper(model, bank, self.shape)
        self._scheduler = Scheduler(self.shape, model.config.vocab_size, self._desk)
        self._loop = Loop(self._stepper, self._scheduler)
        for name, source in (adapters or {}).items():
            self.add_adapter(name, source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def warmup(self) -> None:
        """Compiles all steps and runs each once, and all of the bank (`AdapterBank.warmup`).

        Nothing that comes later compiles anything.
        """
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def work() -> None:
            try:
                self._start()  # an error, if the engine was closed since
                self._stepper.warm_up()
                if self.bank is not None:
                    self.bank.warmup()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:  # what is put in here, the thread takes
            self._start()
            self._inbox.put(work)
        done.result()

    def submit(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        special_tokens: bool = True,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Generation:
        """Asks for an answer, and returns at once.

        Args:
          prompt: text, or tokens.
          params: how the answer's tokens are chosen, and where it ends.
          adapter: a name; None for the base model.
          special_tokens: as in `encode`; for text.
          on_piece: called with each piece, in the engine's thread: it must not wait.

        Raises:
          EngineBusyError: `max_waiting` requests wait already.
          KeyError: there is no such adapter.
          TypeError, ValueError: the prompt is malformed, or with `max_tokens` longer than
            `max_length`; or `params` asks for what the engine was not built for.
          RuntimeError: the engine is closed, or its device has failed.
        """
        params = params or SamplingParams()
        tokens = self._tokens(prompt, special_tokens)
        max_tokens = self._check(tokens, params)
        if adapter is not None and (self._desk is None or not self._desk.knows(adapter)):
            raise KeyError(f"no adapter {shown(adapter)}; {named(self.adapters)}")
        ends = self.config.eos_token_id if params.stop_tokens is None else params.stop_tokens
        text = None
        if self.tokenizer is not None:
            text = TextStream(self.tokenizer, tokens.tolist(), params.stop)
        with self._lock:
            self._start()
            if self._num_open >= self.shape.rows + self.max_waiting:
                raise EngineBusyError(
                    f"{self._num_open} requests run or wait, as many as may; try again later"
                )
            self._num_open += 1
            generation = Generation(lambda: self._inbox.put(cancel), on_piece)
            request = Request(
                next(self._arrivals),
                tokens,
                adapter,
                params,
                max_tokens,
                frozenset(ends),
                text,
                generation,
            )
            cancel = functools.partial(self._scheduler.end, request, FinishReason.cancelled)
            generation.on_done(self._count_end)
            self._inbox.put(functools.partial(self._scheduler.add, request))
        return generation

    @property
    def steps(self) -> int:
        """Steps that have been launched."""
        return self._loop.steps

    @property
    def num_open(self) -> int:
        """Requests that run or wait."""
        return self._num_open

    @property
    def end(self) -> str | None:
        """Why it takes no requests: it was closed, or its device has failed; else None."""
        return self._end

    @property
    def limits(self) -> AdapterLimits:
        """What it takes of adapters."""
        return AdapterLimits() if self._desk is None else self._desk.limits

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that requests may ask for."""
        return () if self._desk is None else self._desk.names

    def add_adapter(self, name: str, source: Source, *, replace: bool = False) -> None:
        """Gives requests an adapter to ask for. It is read when one does.

        Args:
          name: as in `AdapterBank.load`.
          source: a folder in PEFT's form, or an `Adapter`.
          replace: take the place of the adapter of this name. Requests that have begun go on with
            the old one.

        Raises:
          TypeError, ValueError: the name is malformed or taken, or the model has no LoRA layers.
        """
        if self._desk is None:
            raise ValueError("the engine has no bank, so it takes no adapters")
        self._desk.add(name, source, replace=replace)

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter. Requests that have begun go on with it; those that wait for it fail.

        Raises:
          KeyError: there is no such adapter.
        """
        if self._desk is None:
            raise KeyError(f"no adapter {shown(name)}; the engine has no bank")
        self._desk.remove(name)

    def close(self) -> None:
        """Ends all requests as cancelled, and the engine's threads."""
        with self._lock:
            thread, self._end = self._thread, self._end or "the engine is closed"
        atexit.unregister(self.close)
        if thread is not None and thread is not threading.current_thread():
            self._inbox.put(lambda: None)  # wakes it up
            thread.join()
        if self._desk is not None:
            self._desk.close()
            self._take_messages(wait=False)  # an upload that has ended leases its slot
            self._desk.drop_all()

    # ------------------------------------------------------------------------------------- private

    def _tokens(self, prompt: str | Sequence[int] | np.ndarray, special_tokens: bool) -> np.ndarray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt of text needs an engine with a tokenizer")
            return encode(self.tokenizer, [prompt], special_tokens=special_tokens)[0][0]
        tokens = np.asarray(prompt)
        if tokens.ndim == 1 and not tokens.size:
            raise ValueError("a prompt must have at least 1 token, got none")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError(f"a prompt must be text or a list of tokens, got {shown(prompt)}")
        if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(
                f"tokens must lie in [0, {self.config.vocab_size}), got {tokens.min()} to "
                f"{tokens.max()}"
            )
        return tokens.astype(np.int32)

    def _check(self, tokens: np.ndarray, params: SamplingParams) -> int:
        """Raises as `submit`; returns how many tokens the answer may have."""
        assert self.shape.max_length is not None
        room = self.shape.max_length - len(tokens)
        max_tokens = min(_MAX_TOKENS, max(room, 1))
        if params.max_tokens is not None:
            max_tokens = params.max_tokens
        if max_tokens > room:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_tokens={max_tokens} exceed "
                f"max_length={self.shape.max_length}"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need an engine with a tokenizer")
        if params.prompt_logprobs and not self.shape.prompt_logprobs:
            raise ValueError("prompt_logprobs need an engine of StepShape(prompt_logprobs=True)")
        return max_tokens

    def _count_end(self, generation: Generation) -> None:
        with self._lock:
            self._num_open -= 1

    def _fail_waiting(self, adapter: str, reason: str) -> None:
        self._scheduler.fail_waiting(adapter, reason)

    def _start(self) -> None:
        """Starts the thread, by the first one that needs it."""
        if self._end is not None:
            raise RuntimeError(self._end) from self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="jax-lora-engine", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def _run(self) -> None:
        try:
            while self._end is None:
                is_busy = self._loop.turn()
                self._take_messages(wait=not is_busy)
        except Exception as error:
            with self._lock:
                self._error = error
                self._end = printable(f"the engine has failed: {type(error).__name__}: {error}")
        self._take_messages(wait=False)
        for request in list(self._scheduler.requests()):
            if self._error is None:
                self._scheduler.end(request, FinishReason.cancelled)
            else:
                self._scheduler.fail(request, self._end or "")

    def _take_messages(self, *, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            if wait:
                # Those who use the bank beside the engine do not tell when they give back a slot.
                seconds = 0.05 if self._scheduler.is_blocked else None
                self._inbox.get(timeout=seconds)()
            while True:
                self._inbox.get_nowait()()
