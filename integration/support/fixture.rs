//! Fixture programs: building them, talking to them, and the run each has to pass. `fixtures/programs/fixture.h`
//! has the protocol.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use super::family::Family;
use super::session::{DONE, Session};
use super::{numbers, wait};

/// Where the programs are, built once per test run.
pub(crate) fn build_directory() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let build = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fixtures");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let made = Command::new("make")
            .args(["--silent", "-j2", "-C"])
            .arg(&sources)
            .arg(format!("BUILD={}", build.display()))
            .env_remove("MAKEFLAGS")
            .output()
            .expect("running make");
        assert!(
            made.status.success(),
            "building fixtures: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        build
    })
}

/// The source of a program of `fixtures/real`.
pub(crate) fn real(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/real")
        .join(name)
}

/// What starts a program below a process that reaps whatever ends and has lost its parent, as an init should, and ends with
/// the last of them.
pub(crate) fn below_reaper(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(build_directory().join("reaper"));
    command.arg(program);
    command
}

/// A running fixture program.
#[derive(Debug)]
pub(crate) struct Fixture {
    /// The program and all it started.
    pub(crate) family: Family,
    name: String,
    commands: ChildStdin,
    answers: ChildStdout,
    unread: Vec<u8>,
    /// Whether it reads its commands by plain `read` of descriptor 0 on its first thread.
    plain: bool,
    stderr: PathBuf,
    _directory: tempfile::TempDir,
}

impl Fixture {
    /// Starts a program in a directory of its own and waits until it is ready.
    #[track_caller]
    pub(crate) fn start(name: &str) -> Self {
        Self::start_plain(name, Command::new(build_directory().join(name)))
    }

    /// The same, of one whose tracer may die: the kernel then ends some system calls with `EINTR`, as it does at every stop
    /// that is not ours.
    #[track_caller]
    pub(crate) fn start_to_be_left(name: &str) -> Self {
        let mut command = Command::new(build_directory().join(name));
        command.env("FIXTURE_MAY_BE_INTERRUPTED", "1");
        Self::start_plain(name, command)
    }

    #[track_caller]
    fn start_plain(name: &str, command: Command) -> Self {
        let mut fixture = Self::launch(name, command);
        fixture.plain = true;
        fixture.settle();
        fixture
    }

    /// The same for any command that obeys the protocol, however it reads.
    #[track_caller]
    pub(crate) fn launch(name: &str, command: Command) -> Self {
        Self::launch_as(name, command, Family::start)
    }

    /// The same of a command that starts by [`below_reaper`].
    #[track_caller]
    pub(crate) fn launch_below_reaper(name: &str, command: Command) -> Self {
        Self::launch_as(name, command, Family::start_below_reaper)
    }

    #[track_caller]
    fn launch_as(name: &str, command: Command, start: fn(&mut Command) -> Family) -> Self {
        let mut fixture = Self::take_over_as(name, command, start);
        let line = fixture.line("start");
        assert_eq!(line, "READY", "{name} did not get ready");
        fixture
    }

    /// The same of a command after which a program is in the middle of the protocol.
    #[track_caller]
    pub(crate) fn take_over(name: &str, command: Command) -> Self {
        Self::take_over_as(name, command, Family::start)
    }

    #[track_caller]
    fn take_over_as(name: &str, mut command: Command, start: fn(&mut Command) -> Family) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("fixture-")
            .tempdir()
            .expect("making a directory");
        let stderr = directory.path().join("stderr");
        command
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr).expect("making a file"));
        let mut family = start(&mut command);
        let commands = family.child.stdin.take().expect("a pipe");
        let answers = family.child.stdout.take().expect("a pipe");
        Self {
            family,
            name: name.to_owned(),
            commands,
            answers,
            unread: Vec::new(),
            plain: false,
            stderr,
            _directory: directory,
        }
    }

    /// Its PID.
    pub(crate) fn pid(&self) -> i32 {
        self.family.pid()
    }

    /// Whether it runs on after its tracer has died: a plain one reads commands, others are not held any more.
    pub(crate) fn goes_on(&self) -> bool {
        if self.plain {
            return numbers::reads_commands(self.pid());
        }
        let stopped = |pid| numbers::status_number(pid, "TracerPid").unwrap_or(0) != 0;
        !self.family.members().into_iter().any(stopped)
    }

    /// Waits until it is back in the read of the next command.
    #[track_caller]
    pub(crate) fn settle(&self) {
        if self.plain {
            wait::until("the fixture program reads the next command", || {
                numbers::reads_commands(self.pid())
            });
        }
    }

    /// Sends one command and returns its line of answer.
    #[track_caller]
    pub(crate) fn ask(&mut self, command: u8) -> String {
        self.ask_all(&[command])
    }

    /// The same for a command of several bytes.
    #[track_caller]
    pub(crate) fn ask_all(&mut self, command: &[u8]) -> String {
        self.send(command);
        let line = self.line(&String::from_utf8_lossy(command));
        self.settle();
        line
    }

    /// The same of one that may be dying; `None` if it was.
    pub(crate) fn ask_if_alive(&mut self, command: u8) -> Option<String> {
        self.commands.write_all(&[command]).ok()?;
        let line = self.line_unless_ended(&char::from(command).to_string())?;
        self.settle();
        Some(line)
    }

    /// Sends a command and leaves its answer to be read later.
    #[track_caller]
    pub(crate) fn send(&mut self, command: &[u8]) {
        if let Err(error) = self.commands.write_all(command) {
            let mut last = std::mem::take(&mut self.unread);
            let _ = self.answers.read_to_end(&mut last);
            panic!(
                "{} is gone at command {}: {error}; last words: {}; stderr: {}",
                self.name,
                String::from_utf8_lossy(command),
                String::from_utf8_lossy(&last),
                self.stderr()
            );
        }
    }

    /// The next line of answer.
    #[track_caller]
    pub(crate) fn answer(&mut self, what: &str) -> String {
        self.line(what)
    }

    /// `m`.
    #[track_caller]
    pub(crate) fn mutate(&mut self) {
        assert_eq!(self.ask(b'm'), "MUTATED", "{}", self.name);
    }

    /// `r`.
    #[track_caller]
    pub(crate) fn run_on(&mut self) {
        assert_eq!(self.ask(b'r'), "OK", "{}", self.name);
    }

    /// `v`, which must pass.
    #[track_caller]
    pub(crate) fn verify(&mut self, when: &str) {
        assert_eq!(self.ask(b'v'), "PASS", "{} {when}", self.name);
    }

    /// What it wrote to standard error.
    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// The next line it writes.
    #[track_caller]
    fn line(&mut self, what: &str) -> String {
        match self.line_unless_ended(what) {
            Some(line) => line,
            None => panic!("{} ended at {what}; stderr: {}", self.name, self.stderr()),
        }
    }

    #[track_caller]
    fn line_unless_ended(&mut self, what: &str) -> Option<String> {
        let deadline = Instant::now() + wait::PATIENCE;
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).expect("a timeout that fits");
            let ready = poll(
                &mut [PollFd::new(self.answers.as_fd(), PollFlags::POLLIN)],
                timeout,
            );
            assert!(
                ready.expect("polling a pipe") > 0,
                "{} gave no answer to {what}; stderr: {}",
                self.name,
                self.stderr()
            );
            let mut bytes = [0; 4096];
            let count = self.answers.read(&mut bytes).expect("reading a pipe");
            if count == 0 {
                return None;
            }
            self.unread.extend_from_slice(&bytes[..count]);
        }
    }
}

/// Without snapback: what is wrecked is noticed, what is used legitimately is not.
#[track_caller]
pub(crate) fn control_run(program: &str) {
    let mut fixture = Fixture::start(program);
    fixture.verify("right after it is ready");
    fixture.run_on();
    fixture.verify("after it ran on");
    fixture.mutate();
    let answer = fixture.ask(b'v');
    assert!(
        answer.starts_with("FAIL "),
        "{program} did not notice that it was wrecked: {answer}"
    );
}

/// Wrecked and rolled back twice, run on in between.
#[track_caller]
pub(crate) fn rollback_run(program: &str) {
    comes_back(Fixture::start(program));
}

/// Wrecked and rolled back to checkpoints that are increments, in both directions and over a branch.
#[track_caller]
pub(crate) fn increment_run(program: &str) {
    let mut fixture = Fixture::start(program);
    let mut session = Session::new();
    session.will_release(fixture.pid());
    let pid = fixture.pid().to_string();
    let take = |session: &Session, name: &str| {
        session
            .run(&["checkpoint", "--name", name, "--pid", &pid])
            .expect(DONE, name);
    };
    let back = |session: &Session, fixture: &mut Fixture, name: &str| {
        session
            .run(&["rollback", "--verify", "--to", name, "--pid", &pid])
            .expect(DONE, name);
        fixture.verify(name);
    };
    take(&session, "a");
    fixture.run_on();
    take(&session, "b");
    fixture.verify("after two checkpoints");
    fixture.mutate();
    back(&session, &mut fixture, "b");
    fixture.run_on();
    take(&session, "c");
    back(&session, &mut fixture, "a");
    fixture.run_on();
    take(&session, "d");
    fixture.mutate();
    for name in ["c", "d", "b", "a", "c"] {
        back(&session, &mut fixture, name);
    }
    for name in ["a", "c", "b"] {
        session
            .run(&["release", "--name", name, "--pid", &pid])
            .expect(DONE, "release");
    }
    fixture.mutate();
    back(&session, &mut fixture, "d");
    fixture.run_on();
    fixture.verify("at the end");
}

/// The same in a PID namespace of its own, as nobody, without any privilege: what a container's processes may do at most.
#[track_caller]
pub(crate) fn unprivileged_run(program: &str) {
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["setpriv", "--reuid=65534", "--regid=65534"])
        .args(["--clear-groups", "--bounding-set=-all", "--no-new-privs"])
        .arg(build_directory().join(program));
    comes_back(Fixture::launch(program, command));
}

#[track_caller]
pub(crate) fn comes_back(mut fixture: Fixture) {
    let mut session = Session::new();
    session.checkpoint(fixture.pid());
    fixture.verify("after the checkpoint");
    fixture.mutate();
    session.rollback(fixture.pid());
    fixture.verify("after the first rollback");
    fixture.run_on();
    fixture.verify("after it ran on");
    fixture.mutate();
    session.rollback(fixture.pid());
    fixture.verify("after the second rollback");
    fixture.run_on();
    fixture.verify("at the end");
    session.release(fixture.pid()).expect(0, "release");
    fixture.verify("after the release");
}
