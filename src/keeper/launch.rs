//! Starting a keeper: from the program that wants one, and in the new process itself.
//!
//! The keeper is this program executed again with a hidden verb. It inherits three descriptors: the first client's
//! connection as standard input, the state directory's lock as standard output, its log as standard error.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};

use crate::fault;
use crate::keeper::directory::{Found, Locked};
use crate::keeper::protocol::Failure;
use crate::keeper::server::{Operations, serve};
use crate::keeper::target::KEEPER_VERB;
use crate::keeper::{Error, Identity, StateDirectory};

/// What a keeper is to keep.
#[derive(Debug, Clone)]
pub struct Errand {
    /// The root directory of the states, absolute.
    pub root: PathBuf,
    /// The root of the process tree.
    pub target: Identity,
    /// Its cgroup, if it has one of its own.
    pub cgroup: Option<PathBuf>,
    /// The container's name for messages.
    pub label: String,
    /// Whether its checkpoints are to outlive it, so that it can be made again.
    pub outlives: bool,
}

impl Errand {
    /// The keeper's state directory.
    pub fn directory(&self) -> StateDirectory {
        StateDirectory::new(&self.root, &self.target.key(), &self.label)
    }

    /// The command line of a keeper, without the program's name.
    fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--root".into(), self.root.clone().into()];
        arguments.push(KEEPER_VERB.into());
        for (name, value) in [
            ("--pid", self.target.pid.to_string()),
            ("--start-time", self.target.start_time.to_string()),
            ("--label", self.label.clone()),
        ] {
            arguments.extend([name.into(), value.into()]);
        }
        if let Some(cgroup) = &self.cgroup {
            arguments.extend(["--cgroup".into(), cgroup.clone().into()]);
        }
        if self.outlives {
            arguments.push("--outlives".into());
        }
        arguments
    }
}

/// Connects to the keeper that runs, or else starts one with `start`, while the directory is locked; the flag says that it is new.
pub(super) fn connect_or_start(
    directory: &StateDirectory,
    start: impl FnOnce(&Locked) -> Result<UnixStream, Error>,
) -> Result<(UnixStream, bool), Error> {
    if let Found::Keeper(stream) = directory.connect()? {
        return Ok((stream, false));
    }
    let locked = directory.lock()?;
    match locked.connect(directory)? {
        Found::Keeper(stream) => return Ok((stream, false)),
        Found::Stale => locked.remove_socket(directory)?,
        Found::Nothing => {}
    }
    let started = start(&locked);
    if started.is_err() {
        directory.remove(&locked)?;
    }
    Ok((started?, true))
}

/// Starts a keeper; what comes back is its first client's connection.
pub(super) fn start(
    directory: &StateDirectory,
    locked: &Locked,
    errand: &Errand,
) -> Result<UnixStream, Error> {
    Identity::of(errand.target.pid)?;
    let log = directory.create_log()?;
    let failed = |error: io::Error| Error::Start(error.to_string());
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let lock = locked.share().map_err(failed)?;
    Command::new("/proc/self/exe")
        .arg0("snapback")
        .args(errand.arguments())
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(lock))
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(failed)?;
    Ok(ours)
}

/// Runs the keeper in this process, which must have been started for it, until its last checkpoint is released or
/// its container ends. `attach` is called on the thread that then carries out all operations.
///
/// # Errors
///
/// Whatever kept the keeper from serving; the first client has been told too.
pub fn run<O: Operations>(
    errand: &Errand,
    attach: impl FnOnce() -> Result<O, Failure> + Send + 'static,
) -> Result<(), Error> {
    let failed = |error: io::Error| Error::Start(error.to_string());
    close_inherited().map_err(failed)?;
    let first = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    let lock = Locked::inherit(io::stdout().as_fd().try_clone_to_owned().map_err(failed)?);
    leave_the_caller().map_err(failed)?;
    fault::point("keeper.locked");
    serve(&errand.directory(), lock, first, errand.target, attach)
}

/// Closes what the program that started us had open without close-on-exec.
fn close_inherited() -> io::Result<()> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for descriptor in open.into_iter().filter(|descriptor| *descriptor > 2) {
        // The one of the listing itself is closed by now.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}

/// A session, a working directory, a umask and standard streams of our own, and all the descriptors we may have.
fn leave_the_caller() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for stream in [0, 1] {
        nix::unistd::dup2(null.as_raw_fd(), stream)?;
    }
    nix::unistd::setsid()?;
    // Executed as /proc/self/exe it would be called `exe`.
    nix::sys::prctl::set_name(c"snapback")?;
    std::env::set_current_dir(Path::new("/"))?;
    umask(Mode::from_bits_truncate(0o077));
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}
