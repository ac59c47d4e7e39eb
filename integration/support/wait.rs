//! Waiting on conditions, never on time alone.

use std::time::{Duration, Instant};

/// How long anything may take before the test is failed. Generous: the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Polls `condition` until it holds; panics with `what` after [`PATIENCE`].
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    assert!(
        within(PATIENCE, &mut condition),
        "waited {PATIENCE:?} in vain until {what}"
    );
}

/// Polls `condition` for at most `limit`; whether it came to hold.
pub(crate) fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
