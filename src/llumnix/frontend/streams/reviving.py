"""Has other engines go on with the requests of one that died.

`core/streams/survival.py` says which requests, in which order and how many at a time, and
`core/streams/probation.py` which of them may have killed it. Here they are kept, sent again, and
ended if nobody can go on with them. Nothing happens on a token's path: a
stream keeps its tokens anyway (core/streams/stream.py).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from llumnix.core.codes import DispatchCode
from llumnix.core.messages import MigrationRequested
from llumnix.core.settings import SurvivalSettings
from llumnix.core.streams.effects import Moved, Orphaned
from llumnix.core.streams.probation import Verdict
from llumnix.core.streams.quarantine import Quarantine, Quarantined
from llumnix.core.streams.states import StreamState
from llumnix.core.streams.stream import Refusal
from llumnix.core.streams.survival import Orphan, Orphans
from llumnix.core.types import EngineIndex, RequestId
from llumnix.frontend.context import HttpRequest
from llumnix.frontend.engines.engine import Engine
from llumnix.frontend.engines.others import Others
from llumnix.frontend.engines.outputs import DIED_CODE, QUARANTINED_CODE
from llumnix.frontend.streams.client import StreamClient, died
from llumnix.frontend.streams.digests import digest_of
from llumnix.frontend.streams.info import FleetStream, StreamInfo
from llumnix.frontend.streams.revivable import again, kept_bytes, why_never, why_not_now
from llumnix.observe import metrics
from llumnix.observe.lines import about

logger = logging.getLogger("llumnix.frontend")

CONDEMNED = "Instances died of this request, so it is not computed again."
LOOK_EVERY_S = 0.1
"""Between two looks whether an engine has come for requests that wait."""
MB = 10**6


class QuarantinedError(GracefulHTTPError):
    """A new request is refused, since instances died of one like it."""

    code = QUARANTINED_CODE

    def __init__(self, name: str) -> None:
        super().__init__(
            "Instances died of a request like this one, so it is refused. An administrator can "
            f"release it (DELETE /llumnix/v1/quarantine/{name}).",
            HTTPStatus.UNPROCESSABLE_ENTITY,
        )


class RevivingClient(StreamClient):
    """The part of the fleet's client that has requests outlive their engines."""

    def __init__(self, *args: Any, survival: SurvivalSettings | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.orphans = Orphans(survival or SurvivalSettings())
        self.quarantine = Quarantine()
        self._kept_bytes = 0
        self._stir = asyncio.Event()
        self._reviving = False

    async def choose(
        self, request: EngineCoreRequest, outputs: int, *, again: bool = False
    ) -> Engine:
        """The engine for a request with so many output tokens: the controller's choice, if there is
        one. Raises if none takes requests. `again`: its own died."""
        raise NotImplementedError

    def count_dispatch(self, code: DispatchCode) -> None:
        """Adds a dispatch to the metrics."""
        raise NotImplementedError

    # -- what is kept

    def keep(self, info: StreamInfo, request: EngineCoreRequest) -> None:
        """Keeps a new request, so that an engine can go on with it, if that is possible."""
        if not self.orphans.settings.on:
            return
        why = why_never(request, self.vllm_config)
        size = kept_bytes(request)
        if why is None and self._kept_bytes + size > self.orphans.settings.kept_mb * MB:
            why = "its images or embeddings were too many to keep (survival.kept_mb)"
        if why is not None:
            info.why_not_kept = why
            return
        info.sent, info.kept_bytes = request, size
        self._kept_bytes += size

    def _close(
        self, request: RequestId, reason: FinishReason, counted: str | None = None
    ) -> list[EngineIndex]:
        if (stream := self.streams.get(request)) is not None:
            self._kept_bytes -= stream.info.kept_bytes
            stream.info.sent, stream.info.kept_bytes = None, 0
            self.orphans.ended(request)
            self._stir.set()
        return super()._close(request, reason, counted)

    # -- what happens

    def note_death(
        self, engine: Engine, *, blamed: bool, suspects: frozenset[RequestId] | None
    ) -> None:
        """An engine has just died. See `FleetClient.lose`."""
        probation, index = self.orphans.probation, engine.engine_index
        if not (blamed and self.orphans.settings.on):
            probation.lost(index)
            return
        accused = self.accused(index, suspects)
        everyone = accused if self.others is None or suspects is None else suspects
        serving = [e.instance for e in self.engines.takers()]
        probation.died(index, engine.instance, accused, everyone, serving, time.monotonic())
        if accused:
            logger.warning(
                "Instance %s may have died of a request; %d are suspects.",
                engine.instance,
                len(accused),
            )

    def accused(
        self, engine_index: EngineIndex, suspects: frozenset[RequestId] | None
    ) -> frozenset[RequestId]:
        """The requests of this frontend that may have killed an engine. `suspects`: it was one of
        these, if any are known."""
        there = frozenset(s.request for s in self.streams if s.may_be_on(engine_index))
        return there if suspects is None else there & suspects

    def take_turn(self, mine: bool) -> None:
        """Whether suspects of this frontend may be computed again from now on."""
        self.orphans.probation.turn = mine
        self._stir.set()

    def orphaned(self, orphaned: Orphaned) -> None:
        stream = self.streams.get(orphaned.request)
        if stream is None:
            return
        if self.orphans.probation.verdict(orphaned.request) is Verdict.CONDEMNED:
            self._condemn(stream)
            return
        why, now = self._why_it_ends(stream), time.monotonic()
        if why is None:
            orphan = Orphan(
                request=orphaned.request,
                priority=stream.info.priority,
                tokens=stream.info.prompt_tokens + stream.outputs,
                arrived_s=stream.info.started_s,
                since_s=now,
                why=orphaned.why,
                warm=orphaned.warm,
            )
            why = self.orphans.add(orphan, declined=orphaned.declined, now=now)
        if why is not None:
            self.end(orphaned.request, died(why), DIED_CODE)
            return
        self._stir.set()
        if not self._reviving:
            self._reviving = True
            self.start_task(self._revive())

    def _why_it_ends(self, stream: FleetStream) -> str | None:
        """Why the stream of a request that has no engine ends; None if another may go on with
        it."""
        info, lives = stream.info, self.orphans.settings.lives
        if info.sent is None:
            return info.why_not_kept
        if stream.lives_used >= lives:
            return f"{lives} others had gone on with it before (survival.lives)"
        return why_not_now(info.sent, self.vllm_config, stream.outputs)

    def _due(
        self, engine_index: EngineIndex, outputs: list[EngineCoreOutput]
    ) -> list[EngineCoreOutput]:
        due = super()._due(engine_index, outputs)
        if self.orphans.watched:
            self._look_at(engine_index, outputs)
        return due

    def _look_at(self, engine_index: EngineIndex, outputs: Sequence[EngineCoreOutput]) -> None:
        """What an engine says of requests that it is taking up."""
        for output in outputs:
            request = RequestId(output.request_id)
            if self.orphans.engine_of(request) == engine_index:
                try:
                    self._look_at_one(request, output)
                except Exception as error:  # noqa: BLE001 - the other outputs must arrive
                    self.give_up(request, error)
            stream = self.streams.get(request)
            if stream is not None and self.orphans.probation.passed(request, stream.outputs):
                self._clear(request)

    def _look_at_one(self, request: RequestId, output: EngineCoreOutput) -> None:
        stream, ended = self.streams.get(request), output.finish_reason is not None
        if stream is None:
            return
        if stream.owner is not None and (ended or output.new_token_ids):
            self._goes_on(stream, self.orphans.drop(request))
        elif stream.state is StreamState.REVIVING and ended and stream.grant is not None:
            # vLLM refused the request as it came in, so the llumlet has not seen it.
            effects = self.streams.refused(stream.grant.migration, "the engine refused it")
            self._perform(effects, [])

    def _goes_on(self, stream: FleetStream, orphan: Orphan | None) -> None:
        """The first token at its new engine is here, or it has moved from there before."""
        self._stir.set()
        if orphan is not None:
            revival = {
                "request": stream.request,
                "client_id": stream.info.client_id,
                "instance": self.engines.name(stream.owner),
                "tokens": orphan.tokens,
                "gap_s": round(time.monotonic() - orphan.since_s, 6),
                "lives_used": stream.lives_used,
                "why": orphan.why,
            }
            self._log.revival(revival)
            how = "revived" if orphan.tokens > stream.info.prompt_tokens else "resent"
            metrics.STREAMS_SURVIVED.labels(how=how).inc()
            metrics.STREAM_GAP_S.labels(how=how).observe(revival["gap_s"])
            if (http := stream.info.http) is not None and http.span is not None:
                http.span.revived(orphan.since_s, how, revival)

    # -- one after the other

    async def _revive(self) -> None:
        """Until no request waits for an engine."""
        try:
            while self.orphans:
                self._stir.clear()
                try:
                    await self._revive_some()
                except Exception as error:  # noqa: BLE001 - what waits must not wait for ever
                    self.complaints.note("Requests of a dead engine wait", repr(error), error)
                metrics.STREAMS.labels(state="orphaned").set(len(self.orphans))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._stir.wait()
        finally:
            self._reviving = False
            metrics.STREAMS.labels(state="orphaned").set(len(self.orphans))

    async def _revive_some(self) -> None:
        for request in self.orphans.late(time.monotonic()):
            wait_s = self.orphans.settings.wait_s
            why = f"none could go on with it within {wait_s:.0f} s"
            self.end(request, died(why), DIED_CODE)
        for request in self.orphans.to_show(time.monotonic()):
            stream = self.streams.get(request)
            if stream is not None and stream.info.http is not None:
                stream.info.http.waits()
        while True:
            takers = self.engines.takers()
            self.orphans.probation.serve(engine.instance for engine in takers)
            orphan = self.orphans.next([e.engine_index for e in takers], time.monotonic())
            if orphan is None:
                return
            try:
                await self._revive_one(orphan)
            except Exception as error:  # noqa: BLE001 - the others must not wait for ever
                self.give_up(orphan.request, error)

    async def _revive_one(self, orphan: Orphan) -> None:
        stream = self.streams.get(orphan.request)
        assert stream is not None
        assert stream.info.sent is not None
        if self._refused(stream.info.sent) is not None:
            self._end_condemned(stream)
            return
        chosen = await self._engine_for(orphan, stream.info.sent, stream.outputs)
        if chosen is None:
            return  # They have gone meanwhile.
        order = self.streams.revive(orphan.request, chosen.engine_index)
        if isinstance(order, Refusal):
            return  # The stream has ended meanwhile, or the engine has died.
        self.orphans.begin(orphan.request, chosen.engine_index, stream.outputs)
        self.count_dispatch(DispatchCode.REVIVED)
        assert stream.info.sent is not None
        await self.send_to(chosen, again(stream.info.sent, order))

    async def _engine_for(
        self, orphan: Orphan, request: EngineCoreRequest, outputs: int
    ) -> Engine | None:
        """The engine that has a part of its KV, else the controller's choice, else one that has
        the fewest to take up."""

        def takes(engine: Engine | None) -> bool:
            return (
                engine is not None
                and engine.takes_requests
                and self.orphans.may_take(engine.engine_index, orphan)
            )

        if takes(warm := self.engines.get(orphan.warm)):
            return warm
        try:
            chosen = await self.choose(request, outputs, again=True)
        except GracefulHTTPError:
            return None  # The last one has gone meanwhile: it waits, as it did before.
        if takes(chosen):
            return chosen
        takers = [engine.engine_index for engine in self.engines.takers()]
        return self.engines.get(self.orphans.fewest(takers, orphan))

    # -- requests that engines died of

    def _clear(self, request: RequestId) -> None:
        self.orphans.probation.drop(request)
        self._stir.set()

    def _moved(self, moved: Moved, due: list[EngineCoreOutput]) -> None:
        super()._moved(moved, due)
        self._clear(moved.request)
        stream = self.streams.get(moved.request)
        if stream is not None and self.orphans.engine_of(moved.request) is not None:
            self._goes_on(stream, self.orphans.drop(moved.request))

    def _migration_wanted(self, engine_index: EngineIndex, message: MigrationRequested) -> None:
        if self.orphans.probation.engine_of(message.request) is None:
            super()._migration_wanted(engine_index, message)

    def _condemn(self, stream: FleetStream) -> None:
        """It is not computed again, and neither is what is sent again in its place."""
        if stream.info.sent is not None:
            one = Quarantined(
                digest=digest_of(stream.info.sent),
                request=stream.request,
                client_id=stream.info.client_id,
                prompt_tokens=stream.info.prompt_tokens,
                output_tokens=stream.outputs,
                since_s=time.monotonic(),
            )
            self.quarantine.add(one)
            self._log.notes.note("quarantine", one.request, CONDEMNED)
            metrics.QUARANTINED.inc()
            logger.error(
                "Request %s (prompt of %d tokens, %d tokens generated) is quarantined, since "
                "instances died of it.",
                one.id,
                one.prompt_tokens,
                one.output_tokens,
                extra=about("quarantine", request=one.id),
            )
            if self.others is not None:
                self.start_task(self._end_once_known(stream.request, one, self.others))
                return
        self._end_condemned(stream)

    async def _end_once_known(self, request: RequestId, one: Quarantined, others: Others) -> None:
        """Its client may send it again at once, to another frontend."""
        try:
            await others.condemned(one)
        except Exception as error:  # noqa: BLE001 - its client must hear of it all the same
            self.complaints.note("Not all frontends know of a quarantined request", repr(error))
        if (stream := self.streams.get(request)) is not None:
            self._end_condemned(stream)

    def _end_condemned(self, stream: FleetStream) -> None:
        self.end(stream.request, CONDEMNED, QUARANTINED_CODE)

    def _refused(self, request: EngineCoreRequest) -> Quarantined | None:
        if not self.quarantine.has_length(len(request.prompt_token_ids or ())):
            return None
        return self.quarantine.find(digest_of(request), time.monotonic())

    def check_quarantine(self, request: EngineCoreRequest, http: HttpRequest | None) -> None:
        """Raises if instances died of a request like this new one."""
        if (known := self._refused(request)) is None:
            return
        known.refused += 1
        metrics.QUARANTINE_REFUSALS.inc()
        if self.others is not None:
            self.others.refused(known.id)
        if http is not None:
            http.refused(QUARANTINED_CODE)
        raise QuarantinedError(known.id)
