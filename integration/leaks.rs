//! What must stay flat over a thousand rollbacks: descriptors, memory, mappings, threads and processes, of the keeper and of the
//! program.

use std::collections::BTreeMap;

use crate::support::fixture::Fixture;
use crate::support::numbers::{self, Holdings};
use crate::support::session::{DONE, Session};
use crate::support::wait;

/// Rollbacks per test; `SNAPBACK_ROUNDS` overrides it.
fn rounds() -> u32 {
    std::env::var("SNAPBACK_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1000)
}

/// What all processes of the program and the keepers hold, once it does not change any more: a keeper is done with a
/// connection only after its client has gone.
fn survey(session: &Session, fixture: &Fixture) -> BTreeMap<i32, Holdings> {
    let look = || -> BTreeMap<i32, Holdings> {
        let mut pids = fixture.family.members();
        pids.extend(session.keepers());
        pids.into_iter()
            .filter_map(|pid| Some((pid, numbers::holdings(pid)?)))
            .collect()
    };
    let (mut last, mut same) = (look(), 0);
    wait::until("the numbers rest", || {
        let now = look();
        same = if now == last { same + 1 } else { 0 };
        last = now;
        same == 20
    });
    last
}

/// The same processes, descriptors and threads. Memory and mappings may grow by what an allocator keeps, not per
/// round.
#[track_caller]
fn assert_flat(before: &BTreeMap<i32, Holdings>, after: &BTreeMap<i32, Holdings>) {
    let pids = |survey: &BTreeMap<i32, Holdings>| survey.keys().copied().collect::<Vec<_>>();
    assert_eq!(pids(before), pids(after), "processes");
    for (pid, first) in before {
        let last = &after[pid];
        let counts = |it: &Holdings| (it.descriptors, it.threads);
        assert_eq!(
            counts(first),
            counts(last),
            "descriptors and threads of {pid}"
        );
        // An allocator may map a few pieces more; one per rollback would be many.
        assert!(
            last.mappings <= first.mappings + 16,
            "mappings of {pid}: from {first:?} to {last:?}"
        );
        assert!(
            last.resident_kib <= first.resident_kib + first.resident_kib / 10 + 1024,
            "resident memory of {pid}: from {first:?} to {last:?}"
        );
    }
}

/// Wrecked and rolled back many times over.
#[track_caller]
fn rollbacks(program: &str) {
    let mut session = Session::new();
    let mut fixture = Fixture::start(program);
    session.checkpoint(fixture.pid());
    let pid = fixture.pid().to_string();
    let round = |session: &Session, fixture: &mut Fixture| {
        fixture.mutate();
        session
            .run(&["rollback", "--json", "--pid", &pid])
            .expect(DONE, "rollback");
    };
    // Caches fill and allocators settle.
    for _ in 0..30 {
        round(&session, &mut fixture);
    }
    fixture.settle();
    let before = survey(&session, &fixture);
    for _ in 0..rounds() {
        round(&session, &mut fixture);
    }
    fixture.settle();
    assert_flat(&before, &survey(&session, &fixture));
    fixture.verify("after many rollbacks");
    session.rollback(fixture.pid());
    fixture.verify("after one more");
}

/// Checkpoint and release, over and over: nothing of ours stays in the program.
#[track_caller]
fn checkpoints(program: &str) {
    let mut session = Session::new();
    let mut fixture = Fixture::start(program);
    let mut before = None;
    for _ in 0..20 {
        session.checkpoint(fixture.pid());
        fixture.mutate();
        session.rollback(fixture.pid());
        session.release(fixture.pid()).expect(DONE, "release");
        wait::until("the keeper has ended", || session.keepers().is_empty());
        fixture.verify("after a release");
        let now = survey(&session, &fixture);
        match &before {
            None => before = Some(now),
            Some(before) => assert_flat(before, &now),
        }
    }
}

macro_rules! leak_tests {
    ($($program:ident),* $(,)?) => {$(
        mod $program {
            #[test]
            fn stays_flat_over_rollbacks() {
                super::rollbacks(stringify!($program));
            }

            #[test]
            fn stays_flat_over_checkpoints() {
                super::checkpoints(stringify!($program));
            }
        }
    )*};
}

leak_tests! {
    child_threads,
    children_born,
    munmap,
    pending_signals,
    shared_anon,
}

mod orphan_born {
    use crate::orphans::PROCESS_EVENTS;
    use crate::support::session::Session;
    use crate::support::skip;

    #[test]
    fn stays_flat_over_rollbacks() {
        if !Session::new().has(PROCESS_EVENTS) {
            skip!("no {PROCESS_EVENTS}");
        }
        super::rollbacks("orphan_born");
    }

    #[test]
    fn stays_flat_over_checkpoints() {
        if !Session::new().has(PROCESS_EVENTS) {
            skip!("no {PROCESS_EVENTS}");
        }
        super::checkpoints("orphan_born");
    }
}
