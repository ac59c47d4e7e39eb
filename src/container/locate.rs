//! Find a container by its ID: its init process, bundle and status, read from its state without side effects.

use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libcontainer::container::{ContainerStatus, State};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Error;
use super::cgroups::{self, Cgroup};

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` is at work.
    Creating,
    /// Set up, waiting for `start`.
    Created,
    /// Its program runs.
    Running,
    /// Its program runs, but is frozen by `pause`.
    Paused,
    /// Its init process has exited.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// A container found by its ID.
#[derive(Debug, Clone)]
pub struct Located {
    /// Its ID.
    pub id: String,
    /// The directory of its state.
    pub directory: PathBuf,
    /// Where it is in its life.
    pub status: Status,
    /// Its init process in our PID namespace; `None` before there is one and once it has exited.
    pub init: Option<Pid>,
    /// The directory of its bundle.
    pub bundle: PathBuf,
    /// Its cgroup below the root of every hierarchy, if `create` came far enough to choose one.
    pub cgroup: Option<PathBuf>,
    /// Its root directory as the host sees it, if `create` came far enough.
    pub rootfs: Option<PathBuf>,
    /// The directory that the user named for the writable layer of its overlay.
    pub(super) overlay: Option<PathBuf>,
    /// PID and start time of the init that it has, or had.
    pub last_init: Option<(Pid, u64)>,
    /// How it was made.
    pub(super) making: Making,
    pub(super) state: State,
}

impl Located {
    /// The init process of a container that runs.
    ///
    /// # Errors
    /// [`Error::WrongStatus`] if it does not run, which includes that it is paused: the processes of a frozen cgroup
    /// execute nothing.
    pub fn running(&self) -> Result<Pid, Error> {
        match (self.status, self.init) {
            (Status::Running, Some(init)) => Ok(init),
            (Status::Paused, _) => Err(self.wrong_status("it has to be resumed first")),
            _ => Err(self.wrong_status("it has to be running")),
        }
    }

    /// Whether who created it deletes it when it ends, so that it can't come back.
    pub fn is_deleted_at_end(&self) -> bool {
        self.making.is_deleted_at_end
    }

    /// The directories of its cgroup, one for each hierarchy that has one.
    ///
    /// # Errors
    /// [`Error::Io`] if `/proc` can't be read.
    pub fn cgroups(&self) -> Result<Vec<Cgroup>, Error> {
        match &self.cgroup {
            Some(path) => cgroups::directories(path),
            None => Ok(Vec::new()),
        }
    }

    pub(super) fn wrong_status(&self, wanted: &'static str) -> Error {
        Error::WrongStatus {
            id: self.id.clone(),
            status: self.status,
            wanted,
        }
    }
}

/// What `create` remembers of the init process besides what libcontainer does.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Init {
    /// Start time of the process in clock ticks after boot, field 22 of proc_pid_stat(5): with it a PID that was
    /// reused is told from the container's init.
    pub(super) start_time: u64,
    /// The container's cgroup below the root of every hierarchy.
    pub(super) cgroup: PathBuf,
    /// The container's root directory as the host sees it.
    pub(super) rootfs: PathBuf,
    /// The directory that the user named for the writable layer of an overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) overlay: Option<PathBuf>,
    #[serde(default)]
    pub(super) making: Making,
}

/// What `create` was told, for making the container again.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Making {
    /// Where the init's PID was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pid_file: Option<PathBuf>,
    #[serde(default)]
    pub(super) no_pivot: bool,
    #[serde(default)]
    pub(super) no_new_keyring: bool,
    /// Who created it deletes it when it ends.
    #[serde(default)]
    pub(super) is_deleted_at_end: bool,
}

impl Init {
    fn path(directory: &Path) -> PathBuf {
        directory.join("init.json")
    }

    fn load(id: &str, directory: &Path) -> Result<Option<Init>, Error> {
        let path = Init::path(directory);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("reading", path)(error)),
        };
        let bad = |error: serde_json::Error| Error::BadState {
            id: id.to_owned(),
            path,
            reason: error.to_string(),
        };
        serde_json::from_slice(&text).map(Some).map_err(bad)
    }

    pub(super) fn save(&self, directory: &Path) -> Result<(), Error> {
        let text = serde_json::to_vec(self)
            .map_err(|error| Error::io("encoding", directory)(error.into()))?;
        write_whole(&Init::path(directory), &text)
    }
}

/// Writes a file so that a reader sees all of it or nothing.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> Result<(), Error> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let unfinished = path.with_file_name(name);
    fs::write(&unfinished, content)
        .and_then(|()| fs::rename(&unfinished, path))
        .map_err(Error::io("writing", path))
}

/// Whether `id` can name a container: one path component of letters, digits and `_+-.`, as with runc.
pub(super) fn check_id(id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    let reason = if id.is_empty() {
        "it is empty"
    } else if id == "." || id == ".." {
        "it names a directory"
    } else if !id.bytes().all(allowed) {
        "only letters, digits and the characters _ + - . are allowed"
    } else {
        return Ok(());
    };
    Err(Error::InvalidId {
        id: id.to_owned(),
        reason,
    })
}

/// Finds the container `id` whose state is below the directory `root`.
///
/// # Errors
/// [`Error::InvalidId`], [`Error::Unknown`], [`Error::BadState`], or [`Error::Io`] if the state can't be read.
pub fn locate(root: &Path, id: &str) -> Result<Located, Error> {
    check_id(id)?;
    let directory = root.join(id);
    let mut state = load_state(root, id, &directory)?;
    if state.status == ContainerStatus::Created {
        // Where it can't be waited the container has just been deleted, which the next look tells.
        let _ = Starting::wait(&directory);
        state = load_state(root, id, &directory)?;
    }
    let init = Init::load(id, &directory)?;
    let alive = state.pid.filter(|&pid| {
        alive_since(pid)
            .is_some_and(|since| init.as_ref().is_none_or(|init| init.start_time == since))
    });
    let status = match (state.status, alive) {
        (ContainerStatus::Creating, _) => Status::Creating,
        (_, None) | (ContainerStatus::Stopped, _) => Status::Stopped,
        (ContainerStatus::Created, _) => Status::Created,
        (ContainerStatus::Running, _) => Status::Running,
        (ContainerStatus::Paused, _) => Status::Paused,
    };
    Ok(Located {
        id: id.to_owned(),
        status,
        init: alive.map(Pid::from_raw),
        bundle: state.bundle.clone(),
        cgroup: init.as_ref().map(|init| init.cgroup.clone()),
        overlay: init.as_ref().and_then(|init| init.overlay.clone()),
        last_init: init
            .as_ref()
            .and_then(|init| Some((Pid::from_raw(state.pid?), init.start_time))),
        making: init
            .as_ref()
            .map(|init| init.making.clone())
            .unwrap_or_default(),
        rootfs: init.map(|init| init.rootfs),
        directory,
        state,
    })
}

/// Held by `start` from before the program runs until the state says so: a program may be seen at work before that.
pub(super) struct Starting {
    _lock: Flock<File>,
}

impl Starting {
    /// Tells others that a container is being started.
    pub(super) fn begin(directory: &Path) -> Result<Self, Error> {
        Self::lock(directory, FlockArg::LockExclusive)
    }

    /// Waits while it is being started.
    fn wait(directory: &Path) -> Result<Self, Error> {
        Self::lock(directory, FlockArg::LockShared)
    }

    fn lock(directory: &Path, how: FlockArg) -> Result<Self, Error> {
        let file = File::open(directory).map_err(Error::io("opening", directory))?;
        let lock = Flock::lock(file, how)
            .map_err(|(_, error)| Error::io("locking", directory)(error.into()))?;
        Ok(Self { _lock: lock })
    }
}

/// The containers whose state is below `root`, by ID; none if there is no such directory.
///
/// # Errors
/// [`Error::Io`] if the directory can't be read. A container whose state can't be read is an error of its own item.
pub fn list(root: &Path) -> Result<Vec<Result<Located, Error>>, Error> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("reading", root)(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("reading", root))?;
        let id = entry.file_name().to_string_lossy().into_owned();
        // Other things live here too: the keepers' sockets, bundles of containers being created.
        if check_id(&id).is_ok() && State::file_path(&entry.path()).exists() {
            ids.push(id);
        }
    }
    ids.sort();
    let located = ids.iter().map(|id| locate(root, id));
    // A container may be deleted while we look.
    Ok(located
        .filter(|found| !matches!(found, Err(Error::Unknown { .. })))
        .collect())
}

/// How long a state may be half written: as long as its writer waits for a processor.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn load_state(root: &Path, id: &str, directory: &Path) -> Result<State, Error> {
    let path = State::file_path(directory);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Error::Unknown {
                id: id.to_owned(),
                root: root.to_owned(),
            },
            _ => Error::io("reading", &path)(error),
        })?;
        match serde_json::from_slice(&text) {
            Ok(state) => return Ok(state),
            // libcontainer truncates the file and writes it anew: what we see may be half of it.
            Err(error) if error.is_eof() && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => {
                return Err(Error::BadState {
                    id: id.to_owned(),
                    path,
                    reason: error.to_string(),
                });
            }
        }
    }
}

/// The start time of a process that has not exited, in clock ticks after boot.
pub(super) fn alive_since(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may contain anything, so count from its closing parenthesis: proc_pid_stat(5).
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let start_time = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X" | "x")).then_some(start_time)
}

#[cfg(test)]
#[path = "locate_tests.rs"]
mod tests;
