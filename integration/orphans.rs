//! Processes of a tree that have left their parents, where one checkpoint does not show it all.

use crate::support::fixture::{self, Fixture};
use crate::support::session::{DONE, Session};
use crate::support::skip;

/// What the kernel has to have.
pub(crate) const PROCESS_EVENTS: &str = "process events connector";

#[test]
fn an_orphan_born_is_noticed() {
    fixture::control_run("orphan_born");
}

#[test]
fn orphans_born_since_are_gone() {
    if !Session::new().has(PROCESS_EVENTS) {
        skip!("no {PROCESS_EVENTS}");
    }
    fixture::rollback_run("orphan_born");
}

#[test]
fn a_change_of_an_orphan_is_noticed() {
    fixture::control_run("orphan_there");
}

/// It was there at the second checkpoint, so that its memory comes back; at the first it was not.
#[test]
fn an_orphan_comes_back_or_goes() {
    let mut session = Session::new();
    if !session.has(PROCESS_EVENTS) {
        skip!("no {PROCESS_EVENTS}");
    }
    let mut fixture = Fixture::start("orphan_there");
    let pid = fixture.pid().to_string();
    session.will_release(fixture.pid());
    let first = ["checkpoint", "--name", "first", "--pid", &pid];
    session.run(&first).expect(DONE, "checkpoint");
    fixture.run_on();
    fixture.verify("with an orphan");
    let answer = session.checkpoint(fixture.pid());
    assert_eq!(answer.number("processes"), 2, "{answer:#?}");
    for when in ["after one rollback", "after two"] {
        fixture.mutate();
        session.rollback(fixture.pid());
        fixture.verify(when);
        fixture.run_on();
        fixture.verify(when);
    }
    let back = [
        "rollback", "--verify", "--json", "--to", "first", "--pid", &pid,
    ];
    let answer = session.run(&back).expect(DONE, "rollback");
    assert_eq!(answer.number("killed"), 1, "{answer:#?}");
    fixture.verify("before there was an orphan");
    fixture.run_on();
    fixture.verify("with another one");
    session.release(fixture.pid()).expect(DONE, "release");
    fixture.verify("after the release");
}
