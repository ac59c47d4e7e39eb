//! A process that was killed and is made again, against a bare fork of it: one that has its parent's memory, and one that has
//! written to all of it.

mod support;

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use support::{Program, Shape, checkpoint, judged, middle, ms, rollback, table};

const ROUNDS: usize = 9;

fn main() {
    let program = support::compile();
    let rows: Vec<Vec<String>> = [(16, false), (100, false), (100, true)]
        .into_iter()
        .map(|(mib, own)| row(&program, mib, own))
        .collect();
    let header = [
        "MiB",
        "memory",
        "fork ms",
        "rollback ms",
        "with it made again ms",
        "ratio of the difference",
        "pages copied",
    ];
    table("A killed process made again (median of 9)", &header, &rows);
}

fn row(program: &Path, mib: usize, own: bool) -> Vec<String> {
    let shape = Shape {
        processes: 2,
        ..Shape::plain(mib)
    };
    let mut target = Program::tree_of(program, shape, own);
    let fork = middle((0..ROUNDS).map(|_| target.ask("f")).collect());
    let child = child_of(target.pid());
    // It writes before it waits.
    std::thread::sleep(Duration::from_millis(500));
    let (mut engine, _) = checkpoint(&target);
    let without = middle((0..ROUNDS).map(|_| rollback(&mut engine).0).collect());
    let mut pages = 0;
    let round = |_| {
        kill(Pid::from_raw(child), Signal::SIGKILL).expect("killing the child");
        while !has_ended(child) {
            std::thread::yield_now();
        }
        let (time, report) = rollback(&mut engine);
        assert_eq!(report.revived, 1);
        pages = report.dirty_pages;
        time
    };
    let with = middle((0..ROUNDS).map(round).collect());
    engine.release(None).expect("release");
    vec![
        mib.to_string(),
        if own { "its own" } else { "its parent's" }.to_owned(),
        ms(fork),
        ms(without),
        ms(with),
        judged((with - without) / fork, 2.0),
        pages.to_string(),
    ]
}

fn child_of(pid: i32) -> i32 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.expect("reading the children");
    children.trim().parse().expect("one child")
}

/// Whether a process is a zombie.
fn has_ended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_none_or(|(_, rest)| rest.starts_with('Z'))
}
