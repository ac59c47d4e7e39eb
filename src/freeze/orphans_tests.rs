//! Real processes that leave their parents.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::{OnTracerDeath, Tree};
use crate::kernel::procfs;

/// A shell in a process group of its own, which is killed with all that is left in it.
struct Shell {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Shell {
    fn start(script: &str) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a shell");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, answers }
    }

    /// One that leaves a process behind for every line, and answers with its PID.
    fn of_orphans() -> Self {
        Self::start("while read line; do (sleep 1000 > /dev/null & echo $!); done")
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn ask(&mut self) -> Pid {
        writeln!(self.child.stdin.as_mut().expect("a pipe")).expect("ask");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("an answer");
        Pid::from_raw(answer.trim_end().parse().expect("a PID"))
    }

    fn orphan(&mut self) -> Pid {
        let orphan = self.ask();
        self.wait_until_orphan(orphan);
        orphan
    }

    fn wait_until_orphan(&self, orphan: Pid) {
        while parent(orphan) == self.pid() || procfs::comm(orphan) != "sleep" {
            std::thread::yield_now();
        }
        // The subshell was between the two.
        while procfs::Stat::read(parent(orphan)).is_ok_and(|stat| stat.parent() == self.pid()) {
            std::thread::yield_now();
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn parent(pid: Pid) -> Pid {
    procfs::Stat::read(pid).map_or(Pid::from_raw(0), |stat| stat.parent())
}

/// `None` where the kernel does not tell us; `snapback check` says why.
fn watched(root: Pid) -> Option<Tree> {
    let tree = Tree::new(root).expect("a tree");
    if tree.watch.is_none() {
        let strict = std::env::var_os("SNAPBACK_STRICT").is_some_and(|strict| strict == "1");
        assert!(!strict, "no process events");
        println!("SKIP no process events");
        return None;
    }
    Some(tree)
}

#[test]
fn orphans_born_since_are_stopped_with_the_tree() {
    let mut shell = Shell::of_orphans();
    let before = shell.orphan();
    let Some(mut tree) = watched(shell.pid()) else {
        return;
    };
    let mut orphans = Vec::new();
    for count in 1..=3 {
        orphans.push(shell.orphan());
        let stopped = tree.stop(OnTracerDeath::RunOn).expect("stop");
        assert!(stopped.process(before).is_none(), "it was none of ours");
        for orphan in &orphans {
            assert!(stopped.process(*orphan).is_some());
            assert_eq!(procfs::Stat::read(*orphan).expect("stat").state, 't');
        }
        assert_eq!(stopped.processes().count(), 1 + count);
        stopped.resume().expect("resume");
    }
    // One that ends is not waited for, whenever its reaper comes.
    kill(orphans[0], Signal::SIGKILL).expect("kill");
    while procfs::Stat::read(orphans[0]).is_ok_and(|stat| stat.state != 'Z') {
        std::thread::yield_now();
    }
    let stopped = tree.stop(OnTracerDeath::RunOn).expect("stop");
    assert_eq!(stopped.processes().count(), 3);
}

#[test]
fn a_tree_that_leaves_orphans_all_the_time_is_stopped_whole() {
    let mut shell = Shell::start("read line; while :; do ( (/bin/true; /bin/true) & ); done");
    let group = shell.pid();
    let Some(mut tree) = watched(shell.pid()) else {
        return;
    };
    // Those that are orphans already when the tree becomes known would be none of it.
    writeln!(shell.child.stdin.as_mut().expect("a pipe")).expect("tell");
    let mut orphans = 0;
    for _ in 0..200 {
        let stopped = tree.stop(OnTracerDeath::RunOn).expect("stop");
        let all = procfs::numbers(std::path::Path::new("/proc")).expect("list /proc");
        for pid in all {
            let Ok(stat) = procfs::Stat::read(pid) else {
                continue;
            };
            if stat.field(5) == group.as_raw() as u64 && !matches!(stat.state, 'Z' | 'X') {
                assert!(stopped.process(pid).is_some(), "{pid} was missed: {stat:?}");
                orphans += usize::from(stopped.process(stat.parent()).is_none());
            }
        }
        stopped.resume().expect("resume");
        tree.forget_dead(|_| false);
    }
    assert!(orphans > 200, "{orphans} orphans: no more than roots");
    assert_eq!(tree.losses(), 0);
}

#[test]
fn one_that_becomes_an_orphan_before_the_first_stop_is_known() {
    let mut shell =
        Shell::start("while read line; do (sleep 1000 > /dev/null & echo $!; read line); done");
    let orphan = shell.ask();
    let Some(mut tree) = watched(shell.pid()) else {
        return;
    };
    writeln!(shell.child.stdin.as_mut().expect("a pipe")).expect("tell");
    shell.wait_until_orphan(orphan);
    let stopped = tree.stop(OnTracerDeath::RunOn).expect("stop");
    assert!(stopped.process(orphan).is_some());
}

#[test]
fn a_loss_is_counted_and_the_next_orphan_is_found() {
    let mut shell = Shell::of_orphans();
    let Some(mut tree) = watched(shell.pid()) else {
        return;
    };
    assert_eq!(tree.losses(), 0);
    assert!(tree.lose_events());
    let stopped = tree.stop(OnTracerDeath::RunOn).expect("stop");
    assert_eq!(stopped.tree().losses(), 1);
    stopped.resume().expect("resume");
    let orphan = shell.orphan();
    let stopped = tree.stop(OnTracerDeath::RunOn).expect("stop");
    assert_eq!(stopped.tree().losses(), 1);
    assert!(stopped.process(orphan).is_some());
}
