//! Real processes that are wrecked and put back.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};

use nix::unistd::Pid;

use super::*;
use crate::freeze::{OnTracerDeath, Stopped, Tree};
use crate::kernel::procfs;
use crate::outcome::Difference;
use crate::record::Context;

/// A process that evaluates lines of Perl, which every Debian has.
struct Subject {
    child: Child,
    answers: BufReader<ChildStdout>,
    tree: Tree,
}

impl Subject {
    fn start() -> Self {
        let evaluate = r#"use POSIX; $| = 1; while (<STDIN>) { my $got = eval; print defined $got ? $got : "? $@ $!", "\n" }"#;
        let mut child = Command::new("perl")
            .args(["-e", evaluate])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start perl");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let tree = Tree::new(Pid::from_raw(child.id() as i32)).expect("a tree");
        let mut subject = Self {
            child,
            answers,
            tree,
        };
        assert_eq!(subject.ask("1 + 1"), "2");
        subject
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn ask(&mut self, perl: &str) -> String {
        writeln!(self.child.stdin.as_mut().expect("a pipe"), "{perl}").expect("ask perl");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("perl's answer");
        answer.trim_end().into()
    }

    /// Stops the tree in a state in which batches can be run.
    fn stop(&mut self) -> Stopped<'_> {
        self.wait_until_it_reads();
        let mut stopped = self.tree.stop(OnTracerDeath::RunOn).expect("stop");
        prepare(&mut stopped).expect("prepare");
        let living: Vec<Pid> = stopped
            .processes()
            .filter(|process| !process.is_zombie())
            .map(|process| process.pid)
            .collect();
        for pid in living {
            stopped.open_window(pid, 1 << 12).expect("a window");
        }
        stopped
    }

    /// Memory is not put back here, so it has to be in the same place at the checkpoint and at the rollback.
    fn wait_until_it_reads(&self) {
        let path = format!("/proc/{}/syscall", self.pid());
        let reads = || std::fs::read_to_string(&path).is_ok_and(|text| text.starts_with("0 0x0 "));
        while !reads() {
            std::thread::yield_now();
        }
    }

    fn checkpoint(&mut self) -> Context {
        let mut context = Context::buffering().expect("a context");
        let mut stopped = self.stop();
        let asked = ask(&mut stopped).expect("ask");
        asked.record(&stopped, &mut context).expect("record");
        stopped.resume().expect("resume");
        context.finish().expect("finish");
        context
    }

    fn differences(&mut self, context: &Context) -> Vec<String> {
        let recorded = Recorded::read(context, &Renamed::default()).expect("records");
        let mut stopped = self.stop();
        let found = verify(&mut stopped, &recorded).expect("verify");
        stopped.resume().expect("resume");
        found.iter().map(Difference::to_string).collect()
    }

    /// Returns how many processes and threads were killed.
    fn roll_back(&mut self, context: &Context) -> usize {
        let recorded = Recorded::read(context, &Renamed::default()).expect("records");
        let mut stopped = self.stop();
        let observed = observe(&mut stopped, &recorded).expect("check");
        let killed =
            kill_born(&mut stopped, &recorded, &Lost::default()).expect("kill what was born");
        loosen(&mut stopped, &recorded, &observed).expect("loosen");
        restore(&mut stopped, &recorded, &observed).expect("restore");
        let found = verify(&mut stopped, &recorded).expect("verify");
        assert!(found.is_empty(), "{found:?}");
        stopped.resume().expect("resume");
        self.tree.forget_dead(|_| false);
        killed
    }

    fn refusal(&mut self, context: &Context) -> Refusal {
        let recorded = Recorded::read(context, &Renamed::default()).expect("records");
        let mut stopped = self.stop();
        let result = observe(&mut stopped, &recorded);
        stopped.resume().expect("resume");
        match result {
            Err(Error::Refused(refusal)) => refusal,
            other => panic!("{other:?}"),
        }
    }

    /// Wrecks, sees that the oracle notices, rolls back, and asks the process itself.
    fn comes_back(&mut self, build: &str, question: &str, wreck: &str, noticed: &str) {
        self.ask(build);
        let before = self.ask(question);
        let context = self.checkpoint();
        assert_eq!(self.differences(&context), [""; 0]);
        for _ in 0..2 {
            self.ask(wreck);
            assert_ne!(self.ask(question), before, "{wreck} does nothing");
            let found = self.differences(&context);
            assert!(
                found.iter().any(|difference| difference.contains(noticed)),
                "{noticed}: {found:?}"
            );
            self.roll_back(&context);
            assert_eq!(self.ask(question), before);
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let pid = self.pid();
        for child in crate::kernel::procfs::children(pid, pid).unwrap_or_default() {
            let _ = kill(child, Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn observe(stopped: &mut Stopped<'_>, recorded: &Recorded<'_>) -> Result<Observed> {
    let lost = Lost::missing(stopped, recorded)?;
    let refused = |pid: Pid| lost.refuse(pid, "nobody tries").into();
    if let Some(pid) = lost.in_order(recorded).first() {
        return Err(refused(*pid));
    }
    let mut leaders = BTreeMap::new();
    for process in recorded.processes().filter(|process| !process.is_zombie()) {
        leaders.insert(process.pid(), probe::process(stopped, process.pid())?);
    }
    let (seen, changed) = check_from_outside(stopped, recorded, &lost)?;
    if let Some((_, refusal)) = changed.into_iter().next() {
        return Err(refusal.into());
    }
    let (observed, changed) = check(stopped, recorded, &lost, leaders, &seen)?;
    match changed.into_iter().next() {
        None => Ok(observed),
        Some((_, refusal)) => Err(refusal.into()),
    }
}

#[test]
fn umask_comes_back() {
    Subject::start().comes_back("umask 027", "umask", "umask 0777", "umask");
}

#[test]
fn the_working_directory_comes_back() {
    Subject::start().comes_back(
        "chdir '/usr'",
        "getcwd",
        "chdir '/proc'",
        "working directory",
    );
}

#[test]
fn nice_value_and_name_come_back() {
    let nice = "getpriority(0, 0)";
    Subject::start().comes_back(
        "setpriority(0, 0, 3)",
        nice,
        "setpriority(0, 0, 9)",
        "scheduling",
    );
    let name = r#"open my $f, "/proc/self/comm"; <$f> =~ s/\n//r"#;
    Subject::start().comes_back("$0 = 'first'", name, "$0 = 'second'", "comm");
}

#[test]
fn dispositions_come_back() {
    // Perl's own variables are memory, and that is not put back here.
    let question =
        r#"open my $f, "/proc/self/status"; local $/; <$f> =~ /SigIgn:\s*(\w+)/ ? $1 : 0"#;
    Subject::start().comes_back(
        "$SIG{USR1} = 'IGNORE'; 1",
        question,
        "$SIG{USR2} = 'IGNORE'; 1",
        "action of signal 12",
    );
}

#[test]
fn running_code_in_a_process_leaves_its_actions_alone() {
    let question = r#"open my $f, "/proc/self/status"; local $/; <$f> =~ /(SigBlk.*?)Cap/s ? $1 =~ s/\s+/ /gr : 0"#;
    for action in ["'IGNORE'", "sub {}", "'DEFAULT'"] {
        let mut subject = Subject::start();
        subject.ask(&format!(
            "$SIG{{TRAP}} = {action}; $SIG{{ILL}} = {action}; 1"
        ));
        let before = subject.ask(question);
        let context = subject.checkpoint();
        assert_eq!(subject.ask(question), before);
        subject.roll_back(&context);
        let pid = subject.pid();
        let mut stopped = subject.stop();
        stopped.close_window(pid).expect("close the window");
        stopped.resume().expect("resume");
        assert_eq!(subject.ask(question), before);
    }
}

#[test]
fn soft_limits_come_back() {
    // getrlimit and setrlimit by number: there is no wrapper in core Perl.
    let question = "my $r = pack 'QQ', 0, 0; syscall(97, 7, $r); (unpack 'QQ', $r)[0]";
    let wreck = "my $r = pack 'QQ', 0, 0; syscall(97, 7, $r); my @r = unpack 'QQ', $r; $r = pack 'QQ', 11, $r[1]; syscall(160, 7, $r)";
    Subject::start().comes_back("1", question, wreck, "limit 7");
}

#[test]
fn interval_timers_come_back() {
    let question =
        "my $v = pack 'q4', (0) x 4; syscall(36, 0, $v); int((unpack 'q4', $v)[2] / 100)";
    Subject::start().comes_back("alarm 5000", question, "alarm 100; 1", "interval timer 0");
}

#[test]
fn posix_timers_come_back_under_their_numbers() {
    // SIGEV_NONE, CLOCK_MONOTONIC; armed with 5,000 seconds.
    let make = "$e = pack 'QllQQQQQQ', 77, 0, 1, (0) x 6; $i = pack 'l', -1; syscall(222, 1, $e, $i); \
        $v = pack 'q4', 0, 0, 5000, 0; syscall(223, unpack('l', $i), 0, $v, 0)";
    let left = "$v = pack 'q4', (0) x 4; syscall(224, unpack('l', $i), $v) < 0 ? 'none' : int((unpack 'q4', $v)[2] / 100)";
    let delete = "syscall(226, unpack 'l', $i)";
    Subject::start().comes_back(make, left, delete, "POSIX timer 0");
}

#[test]
fn signals_that_wait_come_back_in_order() {
    let block = "sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGUSR1, SIGUSR2, SIGHUP, 40)); \
        kill 'USR1', $$; syscall(129, $$, 40, pack 'llllllqx96', 40, 0, -1, 0, $$, 0, $_) for 1 .. 5; 1";
    // Number and value of each that can be taken, which uses them up.
    let take = "$m = pack 'Q', ~0; $t = pack 'QQ', 0, 0; $s = pack 'x128'; \
        join ' ', map { syscall(128, $m, $s, $t, 8) < 0 ? () : join ':', (unpack 'llllllq', $s)[0, 6] } 1 .. 20";
    let mut subject = Subject::start();
    subject.ask(block);
    let context = subject.checkpoint();
    let before = subject.ask(take);
    assert!(before.contains("40:1 40:2 40:3 40:4 40:5"), "{before}");
    assert!(before.starts_with("10:"), "{before}");
    for _ in 0..3 {
        subject.ask("kill 'USR2', $$; kill 'HUP', $$");
        assert_ne!(subject.differences(&context), [""; 0]);
        subject.roll_back(&context);
        assert_eq!(subject.ask(take), before);
    }
}

#[test]
fn children_born_since_are_killed_and_reaped() {
    let mut subject = Subject::start();
    let context = subject.checkpoint();
    for _ in 0..3 {
        // A child, a grandchild, and one that waits to be reaped.
        subject.ask("if (!fork) { if (!fork) { sleep 1000 } sleep 1000 } 1");
        subject.ask("if (!fork) { POSIX::_exit(0) } 1");
        assert!(subject.roll_back(&context) >= 1);
        assert_eq!(subject.ask("waitpid -1, WNOHANG"), "-1");
    }
}

#[test]
fn orphans_born_since_are_killed() {
    if let Err(error) = crate::kernel::proc_events::ProcEvents::open(1 << 16) {
        let strict = std::env::var_os("SNAPBACK_STRICT").is_some_and(|strict| strict == "1");
        assert!(!strict, "no process events: {error}");
        println!("SKIP no process events: {error}");
        return;
    }
    let mut subject = Subject::start();
    // The variables are made before the checkpoint, as memory does not go back here.
    subject.ask("our ($r, $w, $middle, $orphan); pipe $r, $w; 1");
    let context = subject.checkpoint();
    for _ in 0..3 {
        let orphan = subject.ask(
            r#"if (!($middle = fork)) { if ($orphan = fork) { syswrite $w, "$orphan\n"; POSIX::_exit(0) } sleep 1000 } waitpid $middle, 0; sysread $r, $orphan, 16; 0 + $orphan"#,
        );
        let orphan = Pid::from_raw(orphan.parse().expect("a PID"));
        let killed = subject.roll_back(&context);
        let lives = procfs::Stat::read(orphan).is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X'));
        let _ = kill(orphan, Signal::SIGKILL);
        assert_eq!((killed, lives), (1, false));
    }
}

#[test]
fn what_ended_since_is_refused_by_name() {
    let mut subject = Subject::start();
    let child = subject.ask("$child = fork; if (!$child) { sleep 1000 } $child");
    let context = subject.checkpoint();
    subject.ask("kill 'KILL', $child; waitpid $child, 0");
    let refusal = subject.refusal(&context);
    assert_eq!(refusal.holder, format!("pid {child} (perl)"));
    assert!(refusal.remedy.contains("exited since"), "{refusal}");
}

#[test]
fn dropped_privileges_are_refused() {
    let mut subject = Subject::start();
    let context = subject.checkpoint();
    subject.ask("$) = '65534 65534'; $> = 65534");
    assert_eq!(subject.refusal(&context).object, "its credentials");
}

#[test]
fn a_sleep_ends_after_a_rollback() {
    let mut subject = Subject::start();
    let context = subject.checkpoint();
    // From outside of the program nothing else is to be seen than that it goes on.
    for _ in 0..20 {
        subject.roll_back(&context);
        assert_eq!(subject.ask("select undef, undef, undef, 0.001; 7"), "7");
    }
}
