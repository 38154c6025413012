"""All streams of one frontend, which engine owns each, and the one place that grants epochs.

The protocol (core/streams/states.py) says what may happen to a stream. `StreamTable` feeds it,
keeps the records (core/streams/stream.py), and answers each event with the effects
(core/streams/effects.py) that the frontend has to carry out, in order.
"""

from collections.abc import Iterable, Sequence

from llumnix.core.codes import AbortCode
from llumnix.core.messages import Grant, Migrate, MigrationEnded, Revive, TookOver
from llumnix.core.streams.effects import (
    Abort,
    AskFate,
    Effect,
    GrantEnded,
    Moved,
    Orphaned,
    Revived,
    TellLost,
)
from llumnix.core.streams.index import StreamIndex
from llumnix.core.streams.states import StreamAction, StreamEvent, StreamState
from llumnix.core.streams.stream import Info, Output, Refusal, Stream
from llumnix.core.types import EngineIndex, MigrationId, RequestId
from llumnix.errors import ProtocolError

ENGINE_DIED = "the engine that ran it died"
DESTINATION_DIED = "the destination died"
SOURCE_DIED = "the source died during the migration"
SOURCE_DIED_AFTER = "the source died after the handover"
NO_EFFECTS: tuple[Effect, ...] = ()


class StreamTable(StreamIndex[Info, Output]):
    """The open streams, and what follows from each event."""

    # -- from the request's arrival to its end

    def placed(self, stream: Stream[Info, Output], engine: EngineIndex) -> bool:
        """This engine gets the request. False if the stream was closed meanwhile."""
        if self._streams.get(stream.request) is not stream:
            return False
        stream.machine.feed(StreamEvent.PLACED)
        self._own(stream, engine)
        return True

    def receive(
        self,
        engine: EngineIndex,
        request: RequestId,
        tokens: Sequence[int],
        output: Output,
        due: list[Output],
    ) -> Sequence[Effect]:
        """What an engine said of a request, with its new tokens. It is added to `due` if the client
        is to get it now."""
        # Once a token, hence the list that is passed in: here nothing is allocated.
        stream = self._streams.get(request)
        if stream is None:
            return NO_EFFECTS
        if stream.owner == engine and stream.takeover is None:
            stream.tokens += tokens
            due.append(output)
            return NO_EFFECTS
        return self._receive_moving(stream, engine, tokens, output, due)

    def close(self, request: RequestId) -> tuple[Stream[Info, Output], list[EngineIndex]] | None:
        """The stream is over. Returns it, and the engines that may still hold the request."""
        stream = self._streams.pop(request, None)
        if stream is None:
            return None
        holders = self._holders(stream)
        self._drop_grant(stream)
        self._drop_revoked(stream)
        self._own(stream, None)
        return stream, holders

    # -- migrations

    def grant(
        self,
        request: RequestId,
        destination: EngineIndex,
        address: str,
        copy: str = "staged",
        *,
        wanted: bool = False,
    ) -> Migrate | Refusal:
        """Grants the next epoch to a destination, whose llumlet listens at `address`. Returns the
        order for the source. `wanted`: the source's llumlet asked for it, not a user."""
        stream = self._streams.get(request)
        if stream is None or stream.owner is None:
            return Refusal.NOT_RUNNING
        if stream.owner == destination:
            return Refusal.THERE
        if stream.grant is not None:
            return Refusal.MOVING
        if destination in self._dead:
            return Refusal.ENGINE_DEAD
        if destination in stream.leaving:
            return Refusal.LEAVING  # The request could come there before the abort, and be aborted.
        stream.machine.feed(StreamEvent.GRANT)
        order = Migrate(
            migration=self._next_migration(),
            request=request,
            destination=destination,
            address=address,
            epoch=stream.next_epoch(),
            copy=copy,
            wanted=wanted,
            client=self.client,
        )
        self._grant(stream, order)
        return order

    def revive(self, request: RequestId, destination: EngineIndex) -> Revive | Refusal:
        """Grants an orphan's next epoch to an engine. Returns what to send there."""
        stream = self._streams.get(request)
        if stream is None or stream.state is not StreamState.ORPHAN:
            return Refusal.NO_ORPHAN
        if destination in self._dead:
            return Refusal.ENGINE_DEAD
        stream.machine.feed(StreamEvent.REVIVE)
        order = Revive(
            migration=self._next_migration(),
            request=request,
            destination=destination,
            epoch=stream.next_epoch(),
            outputs=list(stream.tokens),
            client=self.client,
        )
        self._grant(stream, order)
        return order

    def took_over(self, engine: EngineIndex, message: TookOver) -> Sequence[Effect]:
        """A destination says that it owns the request."""
        stream = self._streams.get(message.request)
        if stream is None or stream.grant is None or stream.grant.epoch != message.epoch:
            void = None if stream is None else stream.void_epoch
            if void is not None and message.epoch <= void:
                return NO_EFFECTS  # It had to abort that one, and may have been asked again since.
            return [Abort(engine=engine, request=message.request)]
        if stream.state is StreamState.REVIVING:
            return self._revived(stream, message)
        if stream.state is not StreamState.ASKING:
            _check_count(stream, message, stream.outputs)
        action = stream.machine.feed(StreamEvent.TOOK_OVER)
        stream.takeover = message
        if action is StreamAction.FILL:
            return self._fill(stream, SOURCE_DIED)
        return self._flip(stream) if stream.outputs == message.outputs else NO_EFFECTS

    def ended(self, message: MigrationEnded) -> Sequence[Effect]:
        """The source says how its migration ended. The destination's own word settles a take-over,
        unless it died before that was heard: then no engine has the request any more."""
        return self._ended(message, gone=True)

    def _ended(self, message: MigrationEnded, *, gone: bool) -> Sequence[Effect]:
        """`gone`: an engine that was to go on with the request said itself that it does not have
        it."""
        migration = message.migration
        stream = self._by_migration.get(migration)
        if stream is None or stream.state is StreamState.ASKING:
            return NO_EFFECTS  # The stream has moved or ended, or the source died after this word.
        if migration in stream.revoked:
            if message.taken:
                stream.machine.feed(StreamEvent.REVOKED_BUT_TAKEN)
                return self._orphan(stream, ENGINE_DIED)
            stream.revoked.remove(migration)
            del self._by_migration[migration]
        elif stream.state is StreamState.REVIVING:
            stream.machine.feed(StreamEvent.DECLINED)
            return self._orphan(stream, message.why, declined=message.code, gone=gone)
        elif message.taken:
            stream.machine.feed(StreamEvent.LET_GO)
            return NO_EFFECTS
        else:
            stream.machine.feed(StreamEvent.KEPT)
            self._drop_grant(stream)
        why, code = message.why, message.code
        return [GrantEnded(migration=migration, outcome="aborted", why=why, code=code)]

    def refused(self, migration: MigrationId, why: str) -> Sequence[Effect]:
        """The source could not take the order in and says no more of it; or the engine that was to
        revive a request could not. Changes nothing if anything else was heard of the migration."""
        stream = self._by_migration.get(migration)
        if stream is None:
            return NO_EFFECTS
        unanswered = stream.state in (StreamState.GRANTED, StreamState.REVIVING)
        if not unanswered and migration not in stream.revoked:
            return NO_EFFECTS
        ended = MigrationEnded(migration=migration, request=stream.request, taken=False, why=why)
        return self._ended(ended, gone=False)

    def fate(self, migration: MigrationId, fate: str) -> Sequence[Effect]:
        """A destination answered `AskFate`, or does not answer. `taken` needs no action, since its
        `TookOver` came before."""
        stream = self._by_migration.get(migration)
        if stream is None or stream.state is not StreamState.ASKING or fate == "taken":
            return NO_EFFECTS
        stream.machine.feed(StreamEvent.DECLINED)
        return self._orphan(stream, SOURCE_DIED, gone=fate == "declined")

    def engine_lost(self, engine: EngineIndex, living: Iterable[EngineIndex]) -> Sequence[Effect]:
        """An engine died: nothing of what it still says counts. All `living` engines are told,
        since a migration may outlive its stream."""
        self._dead.add(engine)
        effects: list[Effect] = []
        granted: dict[EngineIndex, list[MigrationId]] = {}
        for stream in self:
            if stream.grant is not None and stream.grant.destination == engine:
                effects += self._destination_lost(stream, stream.grant, granted)
            elif stream.owner == engine:
                effects += self._owner_lost(stream)
        told = [TellLost(engine=e, lost=engine, granted=tuple(granted.get(e, ()))) for e in living]
        return [*told, *effects]

    # -- one stream

    def _revived(self, stream: Stream[Info, Output], message: TookOver) -> Sequence[Effect]:
        if message.outputs != stream.outputs:
            raise ProtocolError(
                f"{stream.request} was revived after {message.outputs} tokens; its client has "
                f"{stream.outputs}"
            )
        grant = stream.grant
        assert grant is not None
        stream.machine.feed(StreamEvent.TOOK_OVER)
        self._drop_grant(stream)
        self._own(stream, grant.destination)
        stream.epoch = grant.epoch
        stream.leaving.discard(grant.destination)
        stream.lives_used += 1
        return [Revived(request=stream.request, owner=grant.destination)]

    def _receive_moving(
        self,
        stream: Stream[Info, Output],
        engine: EngineIndex,
        tokens: Sequence[int],
        output: Output,
        due: list[Output],
    ) -> Sequence[Effect]:
        """Tokens of a stream that was taken over, or of an engine that does not own it."""
        takeover, grant = stream.takeover, stream.grant
        if takeover is None or grant is None:
            return NO_EFFECTS
        if grant.destination == engine:
            stream.held.append((tokens, output))
        elif stream.owner == engine:
            _check_count(stream, takeover, stream.outputs + len(tokens))
            stream.tokens += tokens
            due.append(output)
            if stream.outputs == takeover.outputs:
                return self._flip(stream)
        return NO_EFFECTS

    def _destination_lost(
        self,
        stream: Stream[Info, Output],
        grant: Grant,
        granted: dict[EngineIndex, list[MigrationId]],
    ) -> Sequence[Effect]:
        """Notes in `granted`, by source, a migration whose source gets a fresh epoch."""
        action = stream.machine.feed(StreamEvent.DESTINATION_LOST)
        if action is not StreamAction.REVOKE:
            stream.lives_used += isinstance(grant, Revive)
            return self._orphan(stream, ENGINE_DIED)
        assert stream.owner is not None
        granted.setdefault(stream.owner, []).append(grant.migration)
        stream.revoked.add(grant.migration)
        stream.grant, stream.epoch = None, stream.next_epoch()
        return NO_EFFECTS

    def _owner_lost(self, stream: Stream[Info, Output]) -> Sequence[Effect]:
        action, grant = stream.machine.feed(StreamEvent.OWNER_LOST), stream.grant
        if action is StreamAction.FILL:
            return self._fill(stream, SOURCE_DIED_AFTER)
        if action is StreamAction.ASK and grant is not None:
            return [AskFate(engine=grant.destination, migration=grant.migration)]
        return self._orphan(stream, ENGINE_DIED)

    def _fill(self, stream: Stream[Info, Output], why: str) -> Sequence[Effect]:
        """The owner is dead: what it did not send comes out of the take-over's tail. If the two do
        not fit together, or the client would miss what comes with a token, the destination's
        request is given up."""
        takeover = stream.takeover
        assert takeover is not None
        count = takeover.outputs - stream.outputs
        if not 0 <= count <= len(takeover.tail) or (count and stream.detailed):
            stream.machine.feed(StreamEvent.GAP)
            return self._orphan(stream, why)
        missing = tuple(takeover.tail[-count:]) if count else ()
        stream.tokens += missing
        return self._flip(stream, missing, why)

    def _flip(
        self, stream: Stream[Info, Output], missing: tuple[int, ...] = (), why: str = ""
    ) -> Sequence[Effect]:
        """All tokens up to the take-over are passed on: the destination owns the stream."""
        grant, held = stream.grant, stream.held
        assert grant is not None
        stream.machine.feed(StreamEvent.CAUGHT_UP)
        # The old owner had the request to give away: no destination before this one took it.
        revoked = sorted(stream.revoked)
        self._drop_grant(stream)
        self._drop_revoked(stream)
        self._own(stream, grant.destination)
        stream.epoch = grant.epoch
        for tokens, _ in held:
            stream.tokens += tokens
        outputs = tuple(output for _, output in held)
        return [
            Moved(request=stream.request, owner=grant.destination, missing=missing, held=outputs),
            *(_died_there(migration) for migration in revoked),
            GrantEnded(migration=grant.migration, outcome="migrated", why=why),
        ]

    def _orphan(
        self,
        stream: Stream[Info, Output],
        why: str,
        *,
        declined: AbortCode | None = None,
        gone: bool = False,
    ) -> Sequence[Effect]:
        """No engine runs the request; those that live abort what they may still hold of it.
        `gone`: the one that it was going to has said that it holds nothing."""
        holders = [] if gone else self._holders(stream)
        aborts = [Abort(engine=e, request=stream.request) for e in holders]
        stream.leaving.update(holders)
        migrations, warm = sorted(stream.revoked), None
        if isinstance(stream.grant, Migrate):
            migrations.append(stream.grant.migration)
            warm = stream.grant.destination
        self._drop_grant(stream)
        self._drop_revoked(stream)
        self._own(stream, None)
        stream.void_epoch = stream.last_epoch
        ended = [GrantEnded(migration=m, outcome="lost", why=why) for m in migrations]
        orphaned = Orphaned(
            request=stream.request,
            why=why,
            declined=declined,
            warm=None if warm in self._dead else warm,
        )
        return [*aborts, *ended, orphaned]


def _died_there(migration: MigrationId) -> GrantEnded:
    return GrantEnded(
        migration=migration, outcome="aborted", why=DESTINATION_DIED, code=AbortCode.PEER_LOST
    )


def _check_count(stream: Stream[Info, Output], takeover: TookOver, outputs: int) -> None:
    """The old owner may not say more than what the new one goes on after."""
    if outputs > takeover.outputs:
        raise ProtocolError(
            f"{stream.request}: engine {stream.owner} sent {outputs} tokens, but engine "
            f"{stream.grant and stream.grant.destination} goes on after {takeover.outputs}"
        )
