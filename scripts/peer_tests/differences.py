"""Tests of vLLM that fail with MiKV's scheduler, and why."""

NO_CONSTRUCTOR = (
    "The test makes a scheduler without its constructor, or calls a method without one."
)
MORE_DRAFTS = (
    "The test's model accepts more drafts than were scheduled; MiKV schedules fewer than vLLM."
)
CONNECTORS = "MiKV refuses KV connectors at start-up."
DIFFERENCES: dict[str, str] = {
    "test_abort_request_when_structured_output_fsm_cannot_advance": NO_CONSTRUCTOR,
    "test_connector_completes_partial_prefix_without_importing_missing_host_kv": NO_CONSTRUCTOR,
    "test_scheduler_kv_connector_stats": f"{CONNECTORS} Its statistics are in their field.",
    "test_external_prefix_cache_metrics[True-True]": CONNECTORS,
    "test_priority_scheduling_blast[preemption-5": MORE_DRAFTS,
    "test_priority_scheduling_blast[standard-5": MORE_DRAFTS,
}
"""Reason by a part of the test's name."""
