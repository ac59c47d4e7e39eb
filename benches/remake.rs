//! A process that was killed and is made again, against a bare fork of it: one that has its parent's memory, and one that has
//! written to all of it. And a tree of which all but the root was killed, against starting it afresh.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
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
    let rows: Vec<Vec<String>> = [(1, false), (16, false), (16, true)]
        .into_iter()
        .map(|(mib, own)| whole_tree(&program, mib, own))
        .collect();
    let header = [
        "MiB",
        "memory",
        "started afresh ms",
        "rollback ms",
        "with 99 made again ms",
        "of starting afresh",
    ];
    table(
        "A tree of 100 processes, all killed but the root (median of 9)",
        &header,
        &rows,
    );
}

/// A tree of 100 processes, of which the root's memory is populated, and that of the others inherited or written to.
fn whole_tree(program: &Path, mib: usize, own: bool) -> Vec<String> {
    let shape = Shape {
        processes: 100,
        ..Shape::plain(mib)
    };
    let afresh = |_| {
        let began = Instant::now();
        let target = Program::tree_of(program, shape, own);
        // They write before they wait.
        let members = members_of(target.pid());
        while !members.iter().all(|pid| is_waiting(*pid)) {
            std::thread::yield_now();
        }
        let took = began.elapsed();
        end(&members);
        took.as_secs_f64() * 1e6
    };
    let afresh = middle((0..ROUNDS).map(afresh).collect());
    let target = Program::tree_of(program, shape, own);
    let members = members_of(target.pid());
    while !members.iter().all(|pid| is_waiting(*pid)) {
        std::thread::yield_now();
    }
    let (mut engine, _) = checkpoint(&target);
    let without = middle((0..ROUNDS).map(|_| rollback(&mut engine).0).collect());
    let round = |_| {
        let children = &members[1..];
        for pid in children {
            kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("killing a child");
        }
        while !children.iter().all(|pid| has_ended(*pid)) {
            std::thread::yield_now();
        }
        let (time, report) = rollback(&mut engine);
        assert_eq!(report.revived, children.len());
        time
    };
    let with = middle((0..ROUNDS).map(round).collect());
    engine.release(None).expect("release");
    vec![
        mib.to_string(),
        if own { "their own" } else { "the root's" }.to_owned(),
        ms(afresh),
        ms(without),
        ms(with),
        format!("{:.2}", with / afresh),
    ]
}

/// The root and its children.
fn members_of(root: i32) -> Vec<i32> {
    let children = std::fs::read_to_string(format!("/proc/{root}/task/{root}/children"));
    let children = children.expect("reading the children");
    let children = children.split_whitespace();
    let children = children.map(|pid| pid.parse().expect("a PID"));
    std::iter::once(root).chain(children).collect()
}

/// Whether a process sleeps.
fn is_waiting(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let (_, rest) = stat.rsplit_once(") ").expect("a process");
    rest.starts_with('S')
}

/// Kills processes, and waits until there is nothing left of them.
fn end(members: &[i32]) {
    for pid in members {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("killing a process");
    }
    // The root may be ours.
    let is_there = |pid: &i32| Path::new(&format!("/proc/{pid}")).exists();
    while members.iter().any(is_there) {
        let _ = waitpid(Pid::from_raw(members[0]), None);
        std::thread::yield_now();
    }
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
