//! Fault points: places at which a test can have this process killed.
//!
//! With the environment variable `SNAPBACK_FAULT` set to the name of a point, the process that reaches the point
//! is killed by `SIGKILL` there and then, as by `kill -9` from outside. Compiled into every build, so that what
//! is tested is what is shipped; a point that is not armed costs one relaxed load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The environment variable that arms a point.
pub const VARIABLE: &str = "SNAPBACK_FAULT";

/// Every point there is, in the order in which a checkpoint, its persisting and then a rollback pass them; those of `increment` only after the first,
/// those of `remake` only if it makes a process again.
pub const POINTS: &[&str] = &[
    "keeper.locked",
    "keeper.listening",
    "keeper.attached",
    "keeper.request",
    "keeper.reply",
    "checkpoint.opening",
    "checkpoint.mapped",
    "checkpoint.opened",
    "checkpoint.warm",
    "checkpoint.stopped",
    "checkpoint.observed",
    "checkpoint.window",
    "checkpoint.tasks",
    "checkpoint.objects",
    "checkpoint.shadow",
    "checkpoint.armed",
    "checkpoint.files",
    "checkpoint.resuming",
    "checkpoint.resumed",
    "increment.found",
    "increment.armed",
    "increment.copied",
    "increment.taken",
    "persist.begun",
    "persist.context",
    "persist.spaces",
    "persist.pages",
    "persist.memory",
    "persist.synced",
    "persist.renamed",
    "persist.published",
    "rollback.stopped",
    "rollback.observed",
    "rollback.planned",
    "rollback.mutating",
    "rollback.killed",
    "rollback.mounted",
    "rollback.files",
    "remake.made",
    "remake.opened",
    "remake.laid_out",
    "rollback.remade",
    "rollback.revived",
    "rollback.layout",
    "rollback.scanned",
    "rollback.copied",
    "rollback.rearmed",
    "rollback.objects",
    "rollback.tasks",
    "rollback.verified",
    "rollback.resuming",
    "rollback.resumed",
    "restore.stopped",
    "restore.made",
    "restore.resuming",
];

const UNREAD: u8 = 0;
const OFF: u8 = 1;
const ARMED: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(UNREAD);
static NAME: OnceLock<String> = OnceLock::new();

/// Dies here if `SNAPBACK_FAULT` names this point. `name` is one of [`POINTS`].
#[inline]
pub fn point(name: &str) {
    debug_assert!(
        POINTS.contains(&name),
        "fault point {name} is not in POINTS"
    );
    if STATE.load(Ordering::Relaxed) != OFF {
        reached(name);
    }
}

#[cold]
fn reached(name: &str) {
    let armed = NAME.get_or_init(|| std::env::var(VARIABLE).unwrap_or_default());
    STATE.store(
        if armed.is_empty() { OFF } else { ARMED },
        Ordering::Relaxed,
    );
    if armed == name {
        // Nothing is left to handle an error, and sending a signal to oneself has none.
        let _ = kill(Pid::this(), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_named_once() {
        for (index, name) in POINTS.iter().enumerate() {
            assert!(!POINTS[..index].contains(name), "{name} twice");
        }
    }

    #[test]
    fn unarmed_point_returns() {
        point("keeper.request");
        assert_ne!(STATE.load(Ordering::Relaxed), UNREAD);
    }
}
