//! A keeper's state directory, `ROOT/.keepers/KEY/`: its socket and its log, and the lock under which keepers of one
//! container start and end.
//!
//! The lock is a `flock` on the directory itself, so that there is no lock file to leave behind. The program that
//! starts a keeper takes it and hands it over; the keeper gives it back once it listens: two programs that take the
//! first checkpoint at the same time get one keeper.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::FlockArg;
use nix::unistd::geteuid;

use crate::keeper::{Error, Identity};

const KEEPERS: &str = ".keepers";
const SOCKET: &str = "socket";
const LOG: &str = "log";

/// Where the keeper of one container lives.
#[derive(Debug, Clone)]
pub struct StateDirectory {
    path: PathBuf,
    label: String,
}

/// The state directory, held open and locked. The lock goes when the last duplicate of the descriptor is closed.
#[derive(Debug)]
pub(super) struct Locked {
    directory: File,
}

/// What is at the place of the socket.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing, or not even a directory.
    Nothing,
    /// A socket nobody listens on: its keeper was killed.
    Stale,
    /// A listener that took our connection.
    Keeper(UnixStream),
}

impl StateDirectory {
    /// The directory of the keeper `key` below the root directory; `label` names the container in messages.
    pub fn new(root: &Path, key: &str, label: &str) -> StateDirectory {
        StateDirectory {
            path: root.join(KEEPERS).join(key),
            label: label.to_owned(),
        }
    }

    /// Whether there is one: a keeper runs, or one was killed.
    pub fn is_there(&self) -> bool {
        self.path.is_dir()
    }

    /// The directory that it is in, which keeps its name when the tree gets another root.
    pub(super) fn above(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// The PID of a tree's root and its start time, of keepers below the root directory for a root with this PID.
    pub(super) fn of_pid(root: &Path, pid: i32) -> Vec<Identity> {
        let listed = fs::read_dir(root.join(KEEPERS));
        let names = listed.into_iter().flatten().flatten();
        names
            .filter_map(|entry| Identity::from_key(entry.file_name().to_str()?))
            .filter(|identity| identity.pid == pid)
            .collect()
    }

    /// Gives it another name: its tree has another root.
    pub(super) fn move_to(&mut self, key: &str) -> Result<(), Error> {
        let path = self.path.with_file_name(key);
        fs::rename(&self.path, &path).map_err(Error::io("cannot rename", &self.path))?;
        self.path = path;
        Ok(())
    }

    /// The container's name for messages.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// Where the keeper writes its log.
    pub(super) fn log_path(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// The log, made anew, for the keeper to come.
    pub(super) fn create_log(&self) -> Result<File, Error> {
        let path = self.log_path();
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(Error::io("cannot create the keeper's log", path))
    }

    /// Tries to connect to the keeper.
    pub(super) fn connect(&self) -> Result<Found, Error> {
        match self.open()? {
            Some(directory) => self.connect_in(&directory),
            None => Ok(Found::Nothing),
        }
    }

    /// Makes the directory if need be, and locks it.
    pub(super) fn lock(&self) -> Result<Locked, Error> {
        loop {
            self.create()?;
            if let Some(locked) = self.lock_existing()? {
                return Ok(locked);
            }
        }
    }

    /// Locks the directory; `None` if there is none, or none any more by the time the lock was ours.
    fn lock_existing(&self) -> Result<Option<Locked>, Error> {
        let Some(directory) = self.open()? else {
            return Ok(None);
        };
        lock_exclusively(&directory).map_err(Error::io("cannot lock", &self.path))?;
        let held = directory
            .metadata()
            .map_err(Error::io("cannot look at", &self.path))?;
        match fs::symlink_metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {
                Ok(Some(Locked { directory }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("cannot look at", &self.path)(error)),
        }
    }

    /// Removes what a killed keeper left; `false` if there is a keeper after all: one that was about to listen.
    pub(super) fn remove_stale(&self) -> Result<bool, Error> {
        let Some(locked) = self.lock_existing()? else {
            return Ok(false);
        };
        match self.connect_in(&locked.directory)? {
            Found::Keeper(_) => Ok(false),
            Found::Stale | Found::Nothing => self.remove(&locked).map(|()| true),
        }
    }

    /// Removes the directory at the keeper's end.
    pub(super) fn retire(&self) -> Result<(), Error> {
        match self.lock_existing()? {
            Some(locked) => self.remove(&locked),
            None => Ok(()),
        }
    }

    /// Removes the directory; whoever waits for its lock makes a new one.
    pub(super) fn remove(&self, _: &Locked) -> Result<(), Error> {
        for name in [SOCKET, LOG] {
            let path = self.path.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("cannot remove", path)(error));
                }
                _ => {}
            }
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io("cannot remove", &self.path)(error))
            }
            _ => Ok(()),
        }
    }

    fn create(&self) -> Result<(), Error> {
        let keepers = self.path.parent().unwrap_or(Path::new("/"));
        if let Some(root) = keepers.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o711).create(root);
            made.map_err(Error::io("cannot create the root directory", root))?;
        }
        for directory in [keepers, &self.path] {
            match DirBuilder::new().mode(0o700).create(directory) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(Error::io("cannot create", directory)(error));
                }
                _ => check_private(directory)?,
            }
        }
        Ok(())
    }

    fn open(&self) -> Result<Option<File>, Error> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(&self.path);
        match opened {
            Ok(directory) => Ok(Some(directory)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {
                Err(self.taken(self.path.clone(), "not a directory"))
            }
            Err(error) => Err(Error::io("cannot open", &self.path)(error)),
        }
    }

    fn connect_in(&self, directory: &File) -> Result<Found, Error> {
        let path = self.path.join(SOCKET);
        match UnixStream::connect(socket_in(directory)) {
            Ok(stream) => Ok(Found::Keeper(stream)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Found::Nothing),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                let found = fs::symlink_metadata(&path).map_err(Error::io("cannot look at", &path));
                if found?.file_type().is_socket() {
                    Ok(Found::Stale)
                } else {
                    Err(self.taken(path, "not a socket"))
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => {
                Err(self.taken(path, "a socket of another type"))
            }
            Err(error) => Err(Error::io("cannot connect to", path)(error)),
        }
    }

    fn taken(&self, path: PathBuf, what: &str) -> Error {
        Error::Taken {
            path,
            what: what.to_owned(),
        }
    }
}

impl Locked {
    /// Takes over the lock that the starting program handed to the keeper.
    pub(super) fn inherit(directory: OwnedFd) -> Locked {
        Locked {
            directory: directory.into(),
        }
    }

    /// A duplicate that keeps the lock too.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.directory.try_clone()?.into())
    }

    /// Whether a keeper listens already, or a dead one has left its socket.
    pub(super) fn connect(&self, of: &StateDirectory) -> Result<Found, Error> {
        of.connect_in(&self.directory)
    }

    /// Removes the socket of a killed keeper.
    pub(super) fn remove_socket(&self, of: &StateDirectory) -> Result<(), Error> {
        let path = of.path.join(SOCKET);
        fs::remove_file(&path).map_err(Error::io("cannot remove", path))
    }

    /// Listens on the socket, which only root can reach.
    pub(super) fn listen(&self, of: &StateDirectory) -> Result<UnixListener, Error> {
        let path = of.path.join(SOCKET);
        let near = socket_in(&self.directory);
        let listener =
            UnixListener::bind(&near).map_err(Error::io("cannot listen on", path.clone()))?;
        fs::set_permissions(&near, PermissionsExt::from_mode(0o600))
            .map_err(Error::io("cannot protect", path))?;
        Ok(listener)
    }
}

/// The socket's path by the directory's descriptor: `sun_path` has room for 108 bytes only (unix(7)).
fn socket_in(directory: &File) -> PathBuf {
    format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()).into()
}

#[expect(
    deprecated,
    reason = "nix's Flock unlocks explicitly when dropped, for all duplicates"
)]
fn lock_exclusively(directory: &File) -> io::Result<()> {
    loop {
        match nix::fcntl::flock(directory.as_raw_fd(), FlockArg::LockExclusive) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Refuses a directory that others could have put there or can change.
fn check_private(path: &Path) -> Result<(), Error> {
    let found = fs::symlink_metadata(path).map_err(Error::io("cannot look at", path))?;
    let what = if !found.is_dir() {
        "not a directory"
    } else if found.uid() != geteuid().as_raw() {
        "a directory of another user"
    } else if found.mode() & 0o022 != 0 {
        "a directory that others can write to"
    } else {
        return Ok(());
    };
    Err(Error::Taken {
        path: path.to_owned(),
        what: what.to_owned(),
    })
}
