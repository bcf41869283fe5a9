"""One frozen base that plays every role through small adapters."""
