//! What this version can't undo is refused by name, and nothing is touched.

use crate::support::fixture::{self, Fixture};
use crate::support::session::{REFUSED, Session};

/// Whether every part of the refusal says something.
#[track_caller]
fn assert_named(refused: &serde_json::Value) {
    for part in ["object", "holder", "remedy"] {
        let text = refused[part].as_str().unwrap_or_default();
        assert!(!text.is_empty(), "a refusal without {part}: {refused}");
    }
}

/// What can't be brought back: the rollback is refused, the program runs on as it is, and so again.
#[track_caller]
fn refused_run(program: &str) {
    let mut session = Session::new();
    let mut fixture = Fixture::start(program);
    session.checkpoint(fixture.pid());
    session.rollback(fixture.pid());
    fixture.verify("while nothing has ended");
    fixture.mutate();
    let wrecked = fixture.ask(b'v');
    for _ in 0..2 {
        let answer = session
            .try_rollback(fixture.pid())
            .expect(REFUSED, "rollback");
        assert_eq!(answer.text("outcome"), "refused", "{answer:#?}");
        assert_named(&answer.report["refused"]);
        assert_eq!(
            fixture.ask(b'v'),
            wrecked,
            "a refused rollback changed something"
        );
    }
    fixture.run_on();
}

macro_rules! refused {
    ($($program:ident),* $(,)?) => {$(
        mod $program {
            #[test]
            fn notices_what_is_wrecked() {
                super::fixture::control_run(stringify!($program));
            }

            #[test]
            fn is_refused() {
                super::refused_run(stringify!($program));
            }
        }
    )*};
}

refused! {
    child_filtered,
}
