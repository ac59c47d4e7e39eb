//! What users get wrong and what machines lack: a clear message, the right exit status, the program as it was.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::support::family::Family;
use crate::support::fixture::Fixture;
use crate::support::session::{Answer, DONE, ERROR, LOST, REFUSED, Session, USAGE, finish};
use crate::support::{numbers, skip, wait};

/// The engine's verbs that act on a target.
const VERBS: &[&str] = &["checkpoint", "rollback", "checkpoints", "release"];

/// Ended by itself with one of these, and says why on standard error, naming the cause.
#[track_caller]
fn assert_says(answer: &Answer, statuses: &[i32], cause: &str) {
    assert!(
        statuses.contains(&answer.status),
        "expected one of {statuses:?}: {answer:#?}"
    );
    let said = format!("{}{}", answer.err, answer.out).to_lowercase();
    assert!(
        said.contains(&cause.to_lowercase()),
        "says nothing of {cause:?}: {answer:#?}"
    );
    assert!(!said.contains("panicked"), "{answer:#?}");
}

#[test]
fn usage_errors() {
    let session = Session::new();
    for verb in VERBS {
        for arguments in [
            &[*verb][..],
            &[verb, "some-id", "--pid", "1"],
            &[verb, "--pid", "many"],
            &[verb, "--pid", "-5"],
            &[verb, "--pid", "0"],
            &[verb, "--pid", "99999999999999999999"],
            &[verb, "--no-such-option", "some-id"],
            &[verb, "one", "two"],
        ] {
            let answer = session.run(arguments);
            assert_eq!(answer.status, USAGE, "{arguments:?}: {answer:#?}");
            assert!(!answer.err.is_empty(), "{arguments:?} says nothing");
        }
    }
    assert_eq!(session.run(&["no-such-verb"]).status, USAGE);
    assert_eq!(session.run(&[]).status, USAGE);
}

#[test]
fn unknown_id() {
    let session = Session::new();
    for verb in VERBS {
        let answer = session.run(&[verb, "no-such-container"]);
        assert_says(&answer, &[ERROR], "no-such-container");
    }
    for id in ["../../etc", "a/b", ""] {
        for verb in VERBS {
            let answer = session.run(&[verb, id]);
            assert!(
                [ERROR, USAGE].contains(&answer.status),
                "{verb} {id:?}: {answer:#?}"
            );
        }
    }
}

#[test]
fn unknown_name() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("mprotect");
    session.checkpoint(fixture.pid());
    let pid = fixture.pid().to_string();
    let answer = session.run(&["rollback", "--to", "elsewhere", "--pid", &pid]);
    assert_says(&answer, &[ERROR], "elsewhere");
    let answer = session.run(&["release", "--name", "elsewhere", "--pid", &pid]);
    assert_says(&answer, &[ERROR], "elsewhere");
    fixture.verify("after what is unknown");
    fixture.mutate();
    session.rollback(fixture.pid());
    fixture.verify("after a rollback");
}

#[test]
fn rollback_without_a_checkpoint() {
    let session = Session::new();
    let mut fixture = Fixture::start("mprotect");
    let answer = session.run(&["rollback", "--pid", &fixture.pid().to_string()]);
    assert_says(&answer, &[ERROR], "checkpoint");
    fixture.verify("after nothing");
    assert!(
        session.keepers().is_empty(),
        "a keeper with nothing to keep"
    );
}

#[test]
fn dead_pid() {
    let mut session = Session::new();
    let mut child = Command::new("true").spawn().expect("starting true");
    let pid = child.id();
    // A zombie first, then nobody.
    wait::until("it has ended", || {
        !numbers::is_alive(i32::try_from(pid).expect("a PID"))
    });
    for verb in VERBS {
        let answer = session.run(&[verb, "--pid", &pid.to_string()]);
        assert_says(&answer, &[ERROR, REFUSED], &pid.to_string());
    }
    child.wait().expect("reaping");
    for verb in VERBS {
        let answer = session.run(&[verb, "--pid", &pid.to_string()]);
        assert_says(&answer, &[ERROR, REFUSED], &pid.to_string());
    }

    // The tree dies after its checkpoint: the keeper goes, and the next call says what is the matter.
    let mut fixture = Fixture::start("mprotect");
    session.checkpoint(fixture.pid());
    let gone = fixture.pid();
    fixture.family.end();
    let answer = session.run(&["rollback", "--pid", &gone.to_string()]);
    assert_says(&answer, &[ERROR, REFUSED], &gone.to_string());
    wait::until("the keeper goes with its container", || {
        session.keepers().is_empty()
    });
}

#[test]
fn kernel_thread() {
    if numbers::stat(2).is_none_or(|stat| stat.parent != 0) || fs::read_link("/proc/2/exe").is_ok()
    {
        skip!("PID 2 is no kernel thread here");
    }
    let session = Session::new();
    let answer = session.run(&["checkpoint", "--json", "--pid", "2"]);
    assert_says(&answer, &[REFUSED, ERROR], "kernel thread");
}

#[test]
fn the_caller_itself() {
    // The tree of a shell that runs the command: stopping it would stop the command.
    let session = Session::new();
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!(
        "{} --root {} checkpoint --pid $$; echo \"status $?\"",
        env!("CARGO_BIN_EXE_snapback"),
        session.root().display()
    ));
    let answer = finish(command);
    assert_eq!(
        answer.status, 0,
        "the shell did not end by itself: {answer:#?}"
    );
    assert!(
        answer.out.contains("status 3") || answer.out.contains("status 1"),
        "{answer:#?}"
    );
}

#[test]
fn traced_by_a_debugger() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("hundred_threads");
    let pid = Pid::from_raw(fixture.pid());
    ptrace::seize(pid, ptrace::Options::empty()).expect("tracing");
    let answer = session.try_checkpoint(fixture.pid());
    assert_says(&answer, &[REFUSED], "trace");
    fixture.verify("while it is traced");

    ptrace::interrupt(pid).expect("interrupting");
    waitpid(pid, Some(WaitPidFlag::__WALL)).expect("waiting for the stop");
    ptrace::detach(pid, None).expect("letting go");
    session.checkpoint(fixture.pid());

    // The same at a rollback.
    fixture.mutate();
    let wrecked = fixture.ask(b'v');
    ptrace::seize(pid, ptrace::Options::empty()).expect("tracing");
    let answer = session.try_rollback(fixture.pid());
    assert_says(&answer, &[REFUSED], "trace");
    assert_eq!(
        fixture.ask(b'v'),
        wrecked,
        "a refused rollback changed something"
    );
    ptrace::interrupt(pid).expect("interrupting");
    waitpid(pid, Some(WaitPidFlag::__WALL)).expect("waiting for the stop");
    ptrace::detach(pid, None).expect("letting go");
    session.rollback(fixture.pid());
    fixture.verify("after the debugger has gone");
}

#[test]
fn no_privileges() {
    let open = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o777))
        .tempdir_in("/tmp")
        .expect("making a directory");
    let program = open.path().join("snapback");
    fs::copy(env!("CARGO_BIN_EXE_snapback"), &program).expect("copying the program");
    let mut fixture = Fixture::start("mprotect");
    for verb in VERBS {
        let mut command = Command::new(&program);
        command
            .arg("--root")
            .arg(open.path().join("root"))
            .args([verb, "--pid", &fixture.pid().to_string()])
            .uid(65534)
            .gid(65534)
            .stdin(Stdio::null());
        let answer = finish(command);
        assert_says(&answer, &[ERROR, REFUSED], "root");
    }
    fixture.verify("after somebody else tried");

    // Nor does a keeper of root's answer to others.
    let session = Session::new();
    let mut session = session;
    session.checkpoint(fixture.pid());
    let mut sockets = Vec::new();
    find_sockets(&session.root(), &mut sockets);
    assert!(
        !sockets.is_empty(),
        "the keeper has no socket below its root"
    );
    for socket in sockets {
        let mode = fs::metadata(&socket)
            .expect("a socket")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{}", socket.display());
    }
}

fn find_sockets(directory: &Path, found: &mut Vec<PathBuf>) {
    use std::os::unix::fs::FileTypeExt;
    for entry in fs::read_dir(directory).expect("listing").flatten() {
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() {
            find_sockets(&entry.path(), found);
        } else if kind.is_socket() {
            found.push(entry.path());
        }
    }
}

/// A checkpoint below this root, which can't work.
#[track_caller]
fn checkpoint_below(root: &Path, pid: i32) -> Answer {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    command
        .arg("--root")
        .arg(root)
        .args(["checkpoint", "--pid", &pid.to_string()])
        .stdin(Stdio::null());
    finish(command)
}

#[test]
fn root_that_cannot_be_written() {
    let session = Session::new();
    let mut fixture = Fixture::start("mprotect");
    let file = session.scratch().join("file");
    File::create(&file).expect("making a file");
    for root in [
        file.as_path(),
        &file.join("below"),
        Path::new("/proc/below"),
    ] {
        let answer = checkpoint_below(root, fixture.pid());
        assert_says(&answer, &[ERROR], &root.to_string_lossy());
    }
    fixture.verify("after that");
    assert_eq!(numbers::status_number(fixture.pid(), "TracerPid"), Some(0));
}

/// A mounted file system, gone when this is.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).expect("making a directory");
        mount(
            Some("none"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options),
        )
        .expect("mounting a tmpfs");
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: what counts is that it is out of the way.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn full_file_system() {
    let mut fixture = Fixture::start("mprotect");
    let directory = tempfile::tempdir().expect("making a directory");
    // Room for so many files and directories, the root of the mount included.
    for inodes in 1..6 {
        let mounted = Mounted::tmpfs(
            &directory.path().join(format!("run-{inodes}")),
            &format!("size=16k,nr_inodes={inodes}"),
        );
        // No block is left either.
        let _ = fs::write(mounted.0.join("filler"), vec![1; 1 << 20]);
        let root = mounted.0.join("root");
        let answer = checkpoint_below(&root, fixture.pid());
        if answer.status == DONE {
            // Enough after all: sockets and directories take no blocks.
            let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
            command.arg("--root").arg(&root);
            command.args(["release", "--all", "--pid", &fixture.pid().to_string()]);
            finish(command).expect(DONE, "release");
        } else {
            assert_says(&answer, &[ERROR], "space");
        }
        wait::until("no keeper is left", || {
            numbers::with_argument(&root.to_string_lossy()).is_empty()
        });
        fixture.verify("after a full file system");
    }
}

#[test]
fn read_only_file_system() {
    let mut fixture = Fixture::start("mprotect");
    let directory = tempfile::tempdir().expect("making a directory");
    let mounted = Mounted::tmpfs(&directory.path().join("run"), "ro");
    let answer = checkpoint_below(&mounted.0.join("root"), fixture.pid());
    assert_says(&answer, &[ERROR], "read-only");
    fixture.verify("after that");
}

#[test]
fn socket_path_that_is_taken() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("mprotect");
    session.checkpoint(fixture.pid());
    let mut sockets = Vec::new();
    find_sockets(&session.root(), &mut sockets);
    let socket = sockets.pop().expect("a keeper's socket");
    session.release(fixture.pid()).expect(DONE, "release");
    wait::until("the keeper has ended", || session.keepers().is_empty());

    let directory = socket.parent().expect("a directory");
    fs::create_dir_all(directory).expect("making a directory");
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).expect("making it private");
    // A file, a directory: not ours to remove.
    fs::write(&socket, "mine").expect("making a file");
    let answer = session.try_checkpoint(fixture.pid());
    assert_says(&answer, &[ERROR, REFUSED], "socket");
    assert_eq!(fs::read(&socket).expect("the file is still there"), b"mine");
    fs::remove_file(&socket).expect("removing the file");
    fs::create_dir(&socket).expect("making a directory");
    let answer = session.try_checkpoint(fixture.pid());
    assert_says(&answer, &[ERROR, REFUSED], "socket");
    fs::remove_dir(&socket).expect("removing the directory");
    fixture.verify("after a path that was taken");

    // A socket that nobody listens on, as a killed keeper leaves it, is in nobody's way.
    fs::create_dir_all(directory).expect("making a directory");
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).expect("making it private");
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("binding"));
    session.checkpoint(fixture.pid());
    fixture.mutate();
    session.rollback(fixture.pid());
    fixture.verify("after all");
}

/// A memory cgroup of version 1 or 2, gone when this is.
struct MemoryLimit(PathBuf);

impl MemoryLimit {
    fn new() -> Option<Self> {
        let name = format!("snapback-test-{}", std::process::id());
        ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"]
            .into_iter()
            .map(|hierarchy| Path::new(hierarchy).join(&name))
            .find_map(|path| {
                fs::create_dir(&path).ok()?;
                let limit = Self(path);
                limit.limit_file().map(|_| limit)
            })
    }

    fn limit_file(&self) -> Option<PathBuf> {
        ["memory.limit_in_bytes", "memory.max"]
            .into_iter()
            .map(|name| self.0.join(name))
            .find(|path| path.exists())
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        wait::within(Duration::from_secs(5), || fs::remove_dir(&self.0).is_ok());
    }
}

#[test]
fn memory_limit_too_low() {
    let Some(limit) = MemoryLimit::new() else {
        skip!("no memory cgroup can be made");
    };
    let mut session = Session::new();
    let mut fixture = Fixture::start("dirty_pages");
    fs::write(limit.0.join("cgroup.procs"), fixture.pid().to_string()).expect("joining the cgroup");
    // Its 64 MiB are charged elsewhere; this leaves room for next to nothing new.
    let file = limit.limit_file().expect("a limit");
    fs::write(&file, (256 * 1024).to_string()).expect("setting the limit");
    let answer = session
        .try_checkpoint(fixture.pid())
        .expect(REFUSED, "checkpoint");
    let refused = answer.report["refused"].to_string();
    assert!(refused.contains("memory limit"), "{answer:#?}");
    assert!(numbers::is_alive(fixture.pid()), "{answer:#?}");
    fs::write(&file, (1_u64 << 30).to_string()).expect("lifting the limit");
    fixture.verify("after a checkpoint under a low limit");
    session.checkpoint(fixture.pid());
    fixture.mutate();
    session.rollback(fixture.pid());
    fixture.verify("after a rollback");
}

/// Sends SIGINT to the command so many microseconds after its start, and waits for its end.
fn interrupted(session: &Session, arguments: &[&str], after: Duration) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let mut command = session.command();
    command
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().expect("starting snapback");
    // The moment is what is varied here; there is no condition to wait for.
    std::thread::sleep(after);
    let _ = kill(
        Pid::from_raw(i32::try_from(child.id()).expect("a PID")),
        Signal::SIGINT,
    );
    let status = child.wait().expect("waiting for snapback");
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

#[test]
fn interrupted_in_the_middle() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("munmap");
    let pid = fixture.pid().to_string();
    for step in 0..30 {
        let status = interrupted(
            &session,
            &["checkpoint", "--pid", &pid],
            Duration::from_micros(step * 500),
        );
        assert!([DONE, ERROR, 130].contains(&status), "status {status}");
        fixture.verify("after an interrupted checkpoint");
    }
    session.checkpoint(fixture.pid());
    for step in 0..30 {
        fixture.mutate();
        let wrecked = fixture.ask(b'v');
        let status = interrupted(
            &session,
            &["rollback", "--pid", &pid],
            Duration::from_micros(step * 500),
        );
        assert!([DONE, ERROR, 130].contains(&status), "status {status}");
        // Requests are answered in their order: after this, that one is over, whatever became of it.
        session
            .run(&["checkpoints", "--pid", &pid])
            .expect(DONE, "checkpoints");
        let found = fixture.ask(b'v');
        assert!(found == wrecked || found == "PASS", "half-way: {found}");
        session.rollback(fixture.pid());
        fixture.verify("after a rollback");
    }
}

#[test]
fn several_at_once_are_serialised() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("munmap");
    session.checkpoint(fixture.pid());
    let pid = fixture.pid().to_string();
    for _ in 0..5 {
        fixture.mutate();
        let commands: Vec<_> = (0..6)
            .map(|_| {
                let mut command = session.command();
                command.args(["rollback", "--verify", "--json", "--pid", &pid]);
                std::thread::spawn(move || finish(command))
            })
            .collect();
        for command in commands {
            let answer = command.join().expect("a rollback");
            assert_eq!(answer.status, DONE, "{answer:#?}");
        }
        fixture.settle();
        fixture.verify("after six rollbacks at once");
    }
}

#[test]
fn closed_standard_output() {
    let mut session = Session::new();
    let mut fixture = Fixture::start("munmap");
    session.checkpoint(fixture.pid());
    fixture.mutate();
    let script = format!(
        "{} --root {} rollback --json --pid {} >&-",
        env!("CARGO_BIN_EXE_snapback"),
        session.root().display(),
        fixture.pid()
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script]);
    let answer = finish(command);
    assert_ne!(answer.status, LOST, "{answer:#?}");
    assert!(!answer.err.contains("panicked"), "{answer:#?}");
    session.rollback(fixture.pid());
    fixture.verify("after a rollback that could not print");
}

#[test]
fn a_tree_that_is_stopped_by_hand() {
    // Job control, not ours: as it was found, so it is left.
    let mut session = Session::new();
    let mut family = Family::start(Command::new("sleep").arg("1000").stdin(Stdio::null()));
    let pid = family.pid();
    kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stopping");
    let state = || numbers::stat(pid).map(|stat| stat.state);
    wait::until("it is stopped", || state() == Some('T'));
    let answer = session.try_checkpoint(pid);
    if answer.status == DONE {
        session.rollback(pid);
    } else {
        assert_says(&answer, &[REFUSED], "stop");
    }
    wait::until("it is stopped as before", || state() == Some('T'));
    kill(Pid::from_raw(pid), Signal::SIGCONT).expect("continuing");
    wait::until("it runs", || state() == Some('S'));
    family.end();
}
