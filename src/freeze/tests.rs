//! Stops, injects into and lets go of real processes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use nix::unistd::Pid;

use super::*;
use crate::kernel::ptrace::Registers;

struct Victim(Child);

impl Victim {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a program");
        Self(child)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    fn echo(&mut self, line: &str) -> String {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
        let mut answer = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap())
            .read_line(&mut answer)
            .unwrap();
        answer.trim_end().into()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let pid = self.pid();
        for child in crate::kernel::procfs::children(pid, pid).unwrap_or_default() {
            let _ = nix::sys::signal::kill(child, nix::sys::signal::SIGKILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_batch_runs_and_the_program_does_not_notice() {
    let mut cat = Victim::start("cat", &[]);
    let pid = cat.pid();
    assert_eq!(cat.echo("before"), "before");
    let mut tree = Tree::new(pid).unwrap();
    for round in 0..20 {
        let mut stopped = tree.stop(OnTracerDeath::RunOn).unwrap();
        stopped.open_window(pid, 1 << 20).unwrap();
        let mut batch = Batch::new();
        let out = batch.output(16);
        let text = batch.input(b"hello\0");
        let getpid = batch.call(libc::SYS_getpid, &[]);
        let copied = batch.copy(out.arg(), text, 6);
        let nowhere = batch.call(libc::SYS_close, &[12345.into()]);
        batch.must_succeed(nowhere);
        let skipped = batch.call(libc::SYS_getpid, &[]);
        let done = stopped.run(pid, &batch).unwrap();
        assert_eq!(done.result(getpid), Ok(pid.as_raw() as u64));
        assert_eq!(done.result(copied), Ok(0));
        assert_eq!(&done.bytes(&out)[..6], b"hello\0");
        assert_eq!(done.result(nowhere), Err(nix::errno::Errno::EBADF));
        assert_eq!(done.result(skipped), Err(nix::errno::Errno::ECANCELED));
        stopped.resume().unwrap();
        let line = format!("round {round}");
        assert_eq!(cat.echo(&line), line);
    }
    let mut stopped = tree.stop(OnTracerDeath::RunOn).unwrap();
    stopped.close_window(pid).unwrap();
    stopped.resume().unwrap();
    assert!(
        !std::fs::read_to_string(format!("/proc/{pid}/maps"))
            .unwrap()
            .contains("snapback")
    );
    assert_eq!(cat.echo("after"), "after");
}

#[test]
fn a_whole_tree_stops_and_runs_on() {
    let shell = Victim::start(
        "sh",
        &[
            "-c",
            "sleep 1000 & sleep 1000 & echo up; read line; kill %1 %2",
        ],
    );
    let pid = shell.pid();
    let mut tree = Tree::new(pid).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        let stopped = tree.stop(OnTracerDeath::RunOn).unwrap();
        if stopped.processes().count() == 3 {
            for process in stopped.processes() {
                let stat = crate::kernel::procfs::Stat::read(process.pid).unwrap();
                assert_eq!(stat.state, 't');
            }
            break;
        }
        drop(stopped);
        assert!(
            std::time::Instant::now() < deadline,
            "the shell has not started its children"
        );
    }
    let stat = crate::kernel::procfs::Stat::read(pid).unwrap();
    assert_ne!(stat.state, 't');
    drop(shell);
}

#[test]
fn a_tree_that_forks_all_the_time_is_stopped_whole() {
    let shell = Victim::start("sh", &["-c", "while :; do /bin/true & /bin/true; done"]);
    let mut tree = Tree::new(shell.pid()).unwrap();
    for _ in 0..100 {
        let stopped = tree.stop(OnTracerDeath::RunOn).unwrap();
        for process in stopped.processes().filter(|process| !process.is_zombie()) {
            for thread in &process.threads {
                let stat = crate::kernel::procfs::Stat::of_thread(process.pid, thread.tid).unwrap();
                assert_eq!(stat.state, 't', "{process:?}");
                for child in crate::kernel::procfs::children(process.pid, thread.tid).unwrap() {
                    assert!(stopped.process(child).is_some(), "{child} was missed");
                }
            }
        }
        stopped.resume().unwrap();
        tree.forget_dead(|_| false);
    }
}

#[test]
fn roots_that_cannot_be_taken_are_refused_by_name() {
    let refusal = |pid: i32| match Tree::new(Pid::from_raw(pid)) {
        Err(Error::Refused(refusal)) => refusal.remedy,
        other => panic!("{other:?}"),
    };
    assert!(refusal(0).contains("positive"));
    assert!(refusal(i32::MAX).contains("no such process"));
    assert!(refusal(2).contains("kernel thread") || !std::path::Path::new("/proc/2/comm").exists());
    assert!(refusal(Pid::this().as_raw()).contains("outside"));
    assert!(refusal(1).contains("outside"));
}

#[test]
fn the_death_of_an_init_whose_namespace_holds_a_child_of_ours_is_noticed() {
    let mut outer = Victim::start("unshare", &["--pid", "--fork", "cat"]);
    assert_eq!(outer.echo("up"), "up");
    let children = crate::kernel::procfs::children(outer.pid(), outer.pid()).unwrap();
    let init = children[0];
    let mut tree = Tree::new(init).unwrap();
    let mut stopped = tree.stop(OnTracerDeath::RunOn).unwrap();
    stopped.open_window(init, 1 << 20).unwrap();
    let mut batch = Batch::new();
    batch.call(libc::SYS_clone, &[0.into(); 5]);
    let born = stopped.run(init, &batch).unwrap().born;

    let mut batch = Batch::new();
    let time = batch.input(&[3600u64, 0].map(u64::to_ne_bytes).concat());
    batch.call(libc::SYS_nanosleep, &[time, 0.into()]);
    stopped.start(init, &batch).unwrap();
    nix::sys::signal::kill(init, nix::sys::signal::SIGKILL).unwrap();
    assert!(matches!(stopped.finish(init), Err(Error::Gone(_))));
    drop(stopped);
    for child in born {
        let ended = crate::kernel::ptrace::wait(child);
        assert!(matches!(ended, Ok(crate::kernel::ptrace::Event::Exited(_))));
    }
}

#[test]
fn a_call_is_known_also_between_its_interruption_and_its_going_on() {
    let sleeper = Victim::start("sleep", &["1000"]);
    let pid = sleeper.pid();
    let sleeps = || {
        crate::kernel::procfs::call(pid, pid)
            .is_some_and(|call| call[0] == libc::SYS_clock_nanosleep as u64)
    };
    while !sleeps() {
        std::thread::yield_now();
    }
    let mut tree = Tree::new(pid).unwrap();
    let mut stopped = tree.stop(OnTracerDeath::RunOn).unwrap();
    assert!(stopped.note_calls().unwrap().is_empty());
    let thread = &mut stopped.process_mut(pid).unwrap().threads[0];
    let registers = *thread.registers().unwrap();
    assert_eq!(registers.orig_rax, libc::SYS_clock_nanosleep as u64);
    // What the kernel makes of these when it lets the thread go.
    thread.set_registers(&Registers {
        rax: libc::SYS_restart_syscall as u64,
        orig_rax: u64::MAX,
        rip: registers.rip - 2,
        ..registers
    });
    assert!(stopped.note_calls().unwrap().is_empty());
    let now = *stopped.process_mut(pid).unwrap().threads[0]
        .registers()
        .unwrap();
    assert_eq!((now.rax, now.rip), (registers.rax, registers.rip));
    assert_eq!(
        stopped.number_of_call(pid, &now),
        Some(libc::SYS_clock_nanosleep as u64)
    );
    stopped.resume().unwrap();
    while crate::kernel::procfs::call(pid, pid)
        .is_none_or(|call| call[0] != libc::SYS_restart_syscall as u64)
    {
        std::thread::yield_now();
    }
}
