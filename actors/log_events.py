"""Which events a log tells: one table, from which each line gets its level and its message.

A message is made of fields of the event, which the line has by name too; docs/logs.md shows the same table. Request and
sequence ids are in it; prompts, tokens and keys never are.
"""

import logging
from dataclasses import dataclass

_DEBUG, _INFO, _WARNING, _ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the table. message: a template of `str.format`, over the event's fields."""

    name: str
    level: int
    message: str

    @property
    def level_name(self) -> str:
        """As settings and lines have it."""
        return logging.getLevelName(self.level).lower()


EVENTS: tuple[Event, ...] = (
    # Of any process.
    Event("process_started", _INFO, "{process_name} runs"),
    Event("traces_lost", _WARNING, "traces cannot be sent and are dropped until they can: {reason}"),
    Event("traces_sent_again", _INFO, "traces are sent again; {num_spans} spans or more were dropped"),
    # Of a gateway: its requests.
    Event("request_accepted", _DEBUG, "{request_id}: {prompt_tokens} prompt tokens, {samples} samples"),
    Event("request_taken_up", _INFO, "{request_id} goes on after {former_tokens} tokens from another gateway"),
    Event("request_placed", _DEBUG, "{request_id} is at {worker}"),
    Event("request_moved", _WARNING, "{request_id} leaves {worker} with {output_tokens} tokens: {reason}"),
    Event(
        "request_ended",
        _INFO,
        "{request_id}: {outcome}, {prompt_tokens} prompt and {output_tokens} new tokens in {duration_s:.3f} s",
    ),
    Event("request_rejected", _INFO, "{request_id}: {outcome}: {reason}"),
    Event("request_failed", _ERROR, "{request_id} failed"),
    # Of a gateway: its workers.
    Event("worker_found", _INFO, "{worker} takes requests"),
    Event("worker_lost", _WARNING, "lost worker {worker} ({reason}); {num_requests} requests move"),
    Event("worker_left", _INFO, "{worker} has emptied and left"),
    Event("worker_call_failed", _ERROR, "worker {worker}: {call} failed in a way that no worker should"),
    Event("cancel_unheard", _INFO, "worker {worker} did not hear of {num_sequences} cancels: {reason}"),
    Event("controller_away", _WARNING, "the controller is away, going on with {num_workers} workers: {reason}"),
    Event("controller_back", _INFO, "the controller answers again"),
    Event("node_end_unknown", _WARNING, "Ray does not say whether this node is to end: {reason}"),
    Event("readiness_changed", _INFO, "ready: {ready}"),
    Event("live_look_failed", _ERROR, "a look for the live page failed"),
    Event("viewer_let_go", _INFO, "a viewer of the live page is {num_messages} messages behind; it is let go"),
    Event("keys_read", _INFO, "{path} holds {num_keys} keys now"),
    Event("keys_unusable", _WARNING, "{reason}; the {num_keys} keys of before stay in force"),
    Event("certificate_renewed", _INFO, "new connections get the certificate of serial number {serial_number}"),
    Event("certificate_problem", _WARNING, "{reason}"),
    # Of a worker.
    Event("model_loaded", _INFO, "the dense half is loaded: {dense_bytes} bytes in {duration_s:.3f} s"),
    Event("sequence_taken", _DEBUG, "{sequence_id} waits: {prompt_tokens} prompt tokens, {output_tokens} made before"),
    Event("sequence_ended", _DEBUG, "{sequence_id}: {outcome} in step {step}, {output_tokens} tokens"),
    Event("step_done", _DEBUG, "step {step}: {num_tokens} tokens of {num_sequences} sequences in {duration_s:.3f} s"),
    Event("step_slow", _WARNING, "step {step} took {duration_s:.3f} s"),
    Event("step_retried", _WARNING, "step {step}, layer {layer}: asked again for what {shards} did not do"),
    Event("step_waits", _WARNING, "step {step}, layer {layer} waits for another placement: {reason}"),
    Event("step_failed", _ERROR, "step {step} of {num_sequences} sequences failed after {duration_s:.3f} s: {reason}"),
    Event("link_made", _INFO, "linked to {shard}: {kind}, generation {generation}"),
    Event("link_missing", _WARNING, "no link to {shard} yet: {reason}"),
    Event("link_lost", _WARNING, "shard {shard} is lost: {reason}"),
    Event("loss_unheard", _WARNING, "the controller did not hear that {shard} was lost: {reason}"),
    Event("gateway_gone", _INFO, "a gateway's connection ended: {reason}"),
    Event("engine_stopped", _ERROR, "the engine stopped"),
    # Of a shard.
    Event("checkpoint_opened", _INFO, "the checkpoint is open"),
    Event("experts_taken", _INFO, "{num_copied} experts copied, {num_read} read in {duration_s:.3f} s"),
    Event("expert_not_copied", _WARNING, "{key} is read from the checkpoint: it could not be copied: {reason}"),
    Event("epoch_settled", _INFO, "epoch {epoch}: {num_experts} experts are kept"),
    Event("peer_joined", _INFO, "{peer} is linked: {kind}, generation {generation}"),
    Event("peer_gone", _INFO, "the link to {peer}, generation {generation}, ended at its step {step}: {reason}"),
    Event("packet_refused", _INFO, "step {step} of {peer}, layer {layer}: an expert is not here in epoch {epoch}"),
    Event("packet_failed", _ERROR, "step {step} of {peer}, layer {layer}: computing a packet failed: {reason}"),
    Event("packet_slow", _WARNING, "step {step} of {peer}, layer {layer}: a packet took {duration_s:.3f} s"),
    Event("rendezvous_refused", _WARNING, "rendezvous: a client could not be taken: {reason}"),
    Event("rendezvous_cut_off", _INFO, "rendezvous: a client of link {link} was cut off: {reason}"),
    # Of the controller: the fleet.
    Event("fleet_progress", _INFO, "{line}"),
    Event("member_joined", _INFO, "{member} is admitted"),
    Event("member_state", _INFO, "{member} is {state}"),
    Event("member_lost", _WARNING, "{member} is {state}"),
    Event("member_left", _INFO, "{member} is dismissed"),
    Event("member_gone_already", _INFO, "{member} is gone already"),
    Event("member_not_revived", _WARNING, "{member} could not be started again: {reason}"),
    Event("members_untold", _WARNING, "{num_untold} of {num_members} members were not told within {timeout_s:.0f} s"),
    Event("member_untold", _WARNING, "a part of the fleet was not told: {reason}"),
    Event("link_lost_reported", _WARNING, "{worker} lost its link to {shard}"),
    Event("round_put_off", _WARNING, "a round failed; the next is in {delay_s:.1f} s: {reason}"),
    Event("round_failed", _ERROR, "a round failed; the next is in {delay_s:.1f} s"),
    Event("take_up_failed", _ERROR, "the fleet could not be taken up; trying again in {delay_s:.0f} s"),
    Event("loop_failed", _ERROR, "the loop of the {loop} failed"),
    Event("move_put_off", _WARNING, "{members} cannot move off their node yet: {reason}"),
    Event("slots_not_freed", _WARNING, "a shard may still hold what it no longer needs: {reason}"),
    # Of the controller: what it decides.
    Event("operation_phase", _INFO, "{operation}, {request}: {phase} {reason}"),
    Event("placement_proposed", _INFO, "epoch {epoch} is proposed: {reason}"),
    Event("placement_changed", _INFO, "epoch {epoch} is in force after {duration_s:.3f} s"),
    Event("autoscale_decision", _INFO, "decision {decision}"),
    Event("autoscale_look", _DEBUG, "decision {decision}"),
    Event("autoscale_put_off", _WARNING, "what is wanted cannot be had; asked for again in {delay_s:.0f} s: {reason}"),
    # Of the controller: its records.
    Event("loads_stale", _WARNING, "the loads shown are those of a moment ago: {reason}"),
    Event("record_lost", _WARNING, "{what} of a former life are lost: {reason}"),
    Event("record_unusable", _WARNING, "the stored {what} cannot be used: {reason}"),
    Event("record_unsaved", _WARNING, "{what} is not saved yet: {reason}"),
    Event("record_damaged", _ERROR, "Redis: {key}, {reason}"),
    Event("redis_restarted", _WARNING, "Redis is gone; started it again"),
    Event("redis_gone", _WARNING, "Redis could not be started again: {reason}"),
    Event(
        "redis_emptied", _ERROR, "the embedded Redis begins without records; what it refused is now {path}: {reason}"
    ),
)
BY_NAME = {event.name: event for event in EVENTS}
