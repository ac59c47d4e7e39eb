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

/// A program to be started anew for each point.
type Start<'a> = &'a dyn Fn() -> Fixture;

/// What a program finds of its state. Channels in trouble tell of it in their own words, others each time.
/// `None` if it was dying.
fn found(fixture: &mut Fixture) -> Option<String> {
    let answer = fixture.ask_if_alive(b'v')?;
    let (state, _) = answer.split_once("; channel ").unwrap_or((&answer, ""));
    Some(state.to_owned())
}

/// At every point that a first checkpoint passes.
#[track_caller]
fn checkpoint_run(program: &str, start: Start<'_>) {
    for point in fault::POINTS
        .iter()
        .filter(|point| point.starts_with("keeper.") || point.starts_with("checkpoint."))
    {
        println!("{program}: {point}");
        let mut session = Session::new();
        let mut fixture = start();
        let members = fixture.family.members().len();
        let descriptors = numbers::holdings(fixture.pid()).map(|held| held.descriptors);
        session.set(fault::VARIABLE, point);
        let answer = session.try_checkpoint(fixture.pid());
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        keeper_is_gone(&session, point);
        assert_untraced(&fixture, members, point);
        fixture.verify(point);
        assert_eq!(
            numbers::holdings(fixture.pid()).map(|held| held.descriptors),
            descriptors,
            "{point}: its descriptors"
        );
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
fn rollback_run(program: &str, start: Start<'_>) {
    for point in fault::POINTS
        .iter()
        .filter(|point| point.starts_with("rollback."))
    {
        println!("{program}: {point}");
        let mut session = Session::new();
        let mut fixture = start();
        // The keeper gets its environment when it starts.
        session.set(fault::VARIABLE, point);
        session.checkpoint(fixture.pid());
        fixture.mutate();
        let wrecked = found(&mut fixture).expect("it lives");
        let answer = session.try_rollback(fixture.pid());
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        keeper_is_gone(&session, point);
        wait::until(&format!("{point}: its tracer has let go of it"), || {
            numbers::status_number(fixture.pid(), "TracerPid").unwrap_or(0) == 0
        });
        // Death may still be on its way.
        wait::until(&format!("{point}: it is dead or goes on"), || {
            !numbers::is_alive(fixture.pid()) || fixture.goes_on()
        });
        match found(&mut fixture) {
            Some(state) => assert!(
                state == wrecked || state == "PASS",
                "{point}: neither as it was nor as it should be: {state}"
            ),
            None => wait::until(
                &format!("{point}: the whole tree is dead, as its root is"),
                || fixture.family.members().is_empty(),
            ),
        }
    }
}

macro_rules! fault_tests {
    ($($program:ident),* $(,)?) => {$(
        mod $program {
            #[test]
            fn checkpoint_leaves_it_untouched() {
                let start = || super::Fixture::start_to_be_left(stringify!($program));
                super::checkpoint_run(stringify!($program), &start);
            }

            #[test]
            fn rollback_leaves_it_untouched_or_dead() {
                let start = || super::Fixture::start_to_be_left(stringify!($program));
                super::rollback_run(stringify!($program), &start);
            }
        }
    )*};
}

fault_tests! {
    blocked_sleeps,
    child_threads,
    children_born,
    hundred_processes,
    many_vmas,
    registers,
    shared_anon,
}

/// Python with a dozen busy threads, sockets, and a child that answers through pipes.
mod under_load {
    use crate::support::fixture::{Fixture, real};

    fn start() -> Fixture {
        let mut command = std::process::Command::new("python3");
        command.arg(real("bank.py"));
        Fixture::launch("bank.py", command)
    }

    #[test]
    fn checkpoint_leaves_it_untouched() {
        super::checkpoint_run("bank.py", &start);
    }

    #[test]
    fn rollback_leaves_it_untouched_or_dead() {
        super::rollback_run("bank.py", &start);
    }
}
