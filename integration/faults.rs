//! `kill -9` of the keeper at every fault point: a checkpoint leaves the program as it was; a rollback leaves it as
//! it was, or as it should become, or dead. It is never wrong.

use snapback::fault;

use crate::support::fixture::Fixture;
use crate::support::numbers;
use crate::support::session::{DONE, Session};
use crate::support::wait;

/// Waits for the end of the keeper, and with it of its hold on the tree.
#[track_caller]
fn keeper_is_gone(session: &Session, point: &str) {
    wait::until(&format!("the keeper is gone that died at {point}"), || {
        session.keepers().is_empty()
    });
}

/// Nobody traces a living thread of the family, and no shadow is left in it.
#[track_caller]
fn assert_untraced(fixture: &Fixture, members: usize, point: &str) {
    // The keeper's memory goes before its hold on others.
    let traced = || {
        let mut members = fixture.family.members().into_iter();
        members.any(|pid| numbers::status_number(pid, "TracerPid").unwrap_or(0) != 0)
    };
    wait::until(&format!("{point}: nobody is traced"), || !traced());
    wait::until(
        &format!(
            "{point}: no shadow is left among {:?}",
            fixture.family.members()
        ),
        || fixture.family.members().len() == members,
    );
}

/// At every point that a first checkpoint passes.
#[track_caller]
fn checkpoint_run(program: &str) {
    for point in fault::POINTS
        .iter()
        .filter(|point| !point.starts_with("rollback."))
    {
        println!("{program}: {point}");
        let mut session = Session::new();
        let mut fixture = Fixture::start(program);
        let members = fixture.family.members().len();
        session.set(fault::VARIABLE, point);
        let answer = session.try_checkpoint(fixture.pid());
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        keeper_is_gone(&session, point);
        assert_untraced(&fixture, members, point);
        fixture.verify(point);
        fixture.run_on();
        fixture.verify(point);

        // And it can be kept again.
        session.unset(fault::VARIABLE);
        session.checkpoint(fixture.pid());
        fixture.mutate();
        session.rollback(fixture.pid());
        fixture.verify(point);
    }
}

/// At every point that a rollback passes.
#[track_caller]
fn rollback_run(program: &str) {
    for point in fault::POINTS
        .iter()
        .filter(|point| point.starts_with("rollback."))
    {
        println!("{program}: {point}");
        let mut session = Session::new();
        let mut fixture = Fixture::start(program);
        // The keeper gets its environment when it starts.
        session.set(fault::VARIABLE, point);
        session.checkpoint(fixture.pid());
        fixture.mutate();
        let wrecked = fixture.ask(b'v');
        let answer = session.try_rollback(fixture.pid());
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        keeper_is_gone(&session, point);
        wait::until(&format!("{point}: its tracer has let go of it"), || {
            numbers::status_number(fixture.pid(), "TracerPid").unwrap_or(0) == 0
        });
        // Death may still be on its way.
        wait::until(&format!("{point}: it is dead or goes on"), || {
            !numbers::is_alive(fixture.pid()) || numbers::reads_commands(fixture.pid())
        });
        if !numbers::is_alive(fixture.pid()) {
            wait::until(
                &format!("{point}: the whole tree is dead, as its root is"),
                || fixture.family.members().is_empty(),
            );
            continue;
        }
        let found = fixture.ask(b'v');
        assert!(
            found == wrecked || found == "PASS",
            "{point}: neither as it was nor as it should be: {found}"
        );
    }
}

macro_rules! fault_tests {
    ($($program:ident),* $(,)?) => {$(
        mod $program {
            #[test]
            fn checkpoint_leaves_it_untouched() {
                super::checkpoint_run(stringify!($program));
            }

            #[test]
            fn rollback_leaves_it_untouched_or_dead() {
                super::rollback_run(stringify!($program));
            }
        }
    )*};
}

fault_tests! {
    blocked_sleeps,
    children_born,
    hundred_processes,
    many_vmas,
    registers,
    shared_anon,
}
