//! `create` and `start`.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;

use super::config::{self, Bundle};
use super::locate::{self, Init, Located, Making, Starting, Status, locate, write_whole};
use super::overlay::{self, Layer};
use super::program::Program;
use super::{Error, cgroups, children, copy_up};
use crate::kernel::{keyring, loopback, pidfd};

/// What `create` is told.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    /// The directory of the containers' states.
    pub(crate) root: &'a Path,
    /// Where its state is made instead, if there is one that it is to take the place of.
    pub(crate) again: Option<&'a Path>,
    pub(crate) id: &'a str,
    pub(crate) bundle: &'a Path,
    /// The socket that gets the terminal of a container that has one.
    pub(crate) console_socket: Option<&'a Path>,
    /// Where the init's PID is written.
    pub(crate) pid_file: Option<&'a Path>,
    /// Number of descriptors from 3 on that the program inherits.
    pub(crate) preserve_fds: i32,
    /// Enter the root by moving the mount instead of pivot_root(2).
    pub(crate) no_pivot: bool,
    /// Leave the program the session keyring of the caller.
    pub(crate) no_new_keyring: bool,
    /// Who creates it deletes it when it ends.
    pub(crate) is_deleted_at_end: bool,
    /// Put an overlay over the root directory, with its writable layer there.
    pub(crate) overlay: Option<overlay::Place<'a>>,
    /// The signal mask the program starts with.
    pub(crate) mask: SigSet,
}

/// A process of a container that is our child until we exit.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
}

impl Child {
    pub(super) fn new(pid: Pid) -> Result<Child, Error> {
        let pidfd = pidfd::open(pid).map_err(Error::kernel(format!("opening process {pid}")))?;
        Ok(Child { pid, pidfd })
    }
}

/// Creates a container; its init waits for [`start`]. Only from a process without threads. On an error nothing is
/// left of the container.
pub(crate) fn create(options: &Options<'_>) -> Result<Child, Error> {
    let Options { root, id, .. } = *options;
    locate::check_id(id)?;
    let mut directories = DirBuilder::new();
    directories
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(Error::io("creating", root))?;
    let root = &fs::canonicalize(root).map_err(Error::io("opening", root))?;
    let bundle = Bundle::load(options.bundle, id)?;

    // Two at once with the same ID would both see that it is free. Unlocking is explicit (in `Drop`): the new init
    // has a copy of the descriptor until it becomes the program.
    let lock = File::open(root).map_err(Error::io("opening", root))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| Error::kernel(format!("locking {}", root.display()))(error))?;
    let directory = options.again.unwrap_or(root).join(id);
    if directory.exists() {
        return Err(Error::Exists(id.to_owned()));
    }

    let rootfs = bundle.rootfs();
    let prepare = |place| Layer::prepare(place, root, id, &rootfs);
    let layer = options.overlay.map(prepare).transpose()?;
    let make = || {
        let child = build(options, root, &bundle)?;
        finish(options, &directory, &bundle, layer.as_ref(), &child)?;
        Ok(child)
    };
    let made = match &layer {
        Some(layer) => layer.mounted(make),
        None => make(),
    };
    made.inspect_err(|_| {
        children::abandon();
        if let Some(layer) = layer.as_ref().filter(|_| options.again.is_none()) {
            let _ = overlay::remove(root, id, layer.given.as_deref());
        }
        // What could not be removed is told by the error that comes first.
        let _ = cgroups::directories(&bundle.cgroup).and_then(|cgroups| cgroups::remove(&cgroups));
        let _ = config::remove_directory(&directory);
    })
}

/// The directory that takes the bundle's place while the container is made.
pub(super) fn stand_in(root: &Path, id: &str) -> PathBuf {
    root.join(format!(".bundle-{id}"))
}

fn build(options: &Options<'_>, root: &Path, bundle: &Bundle) -> Result<Child, Error> {
    let what = || format!("creating container {:?}", options.id);
    let stand_in = stand_in(root, options.id);
    config::remove_directory(&stand_in)?;
    let directory = if bundle.as_written {
        bundle.directory.clone()
    } else {
        bundle.write_stand_in(&stand_in)?;
        stand_in.clone()
    };
    let caller = Caller::remember();
    prepare_inheritance(options.id, options.no_new_keyring)?;
    let built = ContainerBuilder::new(options.id.to_owned(), SyscallType::default())
        .with_executor(Program {
            mask: options.mask,
            restrictions: None,
        })
        .with_root_path(options.again.unwrap_or(root))
        .map(|builder| {
            builder
                .with_console_socket(absolute(options.console_socket))
                .with_preserved_fds(options.preserve_fds)
                .as_init(directory)
                .with_systemd(false)
                .with_no_pivot(options.no_pivot)
                .with_detach(true)
        })
        .and_then(|builder| builder.build());
    caller.restore();
    let removed = config::remove_directory(&stand_in);
    let container = built.map_err(Error::runtime(what()))?;
    removed?;
    let pid = container
        .pid()
        .ok_or_else(|| Error::Unsupported(format!("{}: it has no init", what())))?;
    Child::new(pid)
}

/// Sets what a container's process inherits from the caller and libcontainer leaves alone, as runc does: the file
/// creation mask, also of the mount points made for it, and the keys it possesses.
pub(super) fn prepare_inheritance(id: &str, no_new_keyring: bool) -> Result<(), Error> {
    umask(Mode::from_bits_truncate(0o022));
    if no_new_keyring {
        return Ok(());
    }
    let name = CString::new(format!("_ses.{id}")).unwrap_or_default();
    keyring::join_session(&name).map_err(Error::kernel(
        "joining a session keyring (see --no-new-keyring)",
    ))
}

/// What is left to do when libcontainer is done: the state's details, the loopback interface, the PID file.
fn finish(
    options: &Options<'_>,
    directory: &Path,
    bundle: &Bundle,
    layer: Option<&Layer>,
    child: &Child,
) -> Result<(), Error> {
    let id = options.id;
    let gone = || Error::Unsupported(format!("creating container {id:?}: its init has exited"));
    let start_time = locate::alive_since(child.pid.as_raw()).ok_or_else(gone)?;
    Init {
        start_time,
        cgroup: bundle.cgroup.clone(),
        rootfs: bundle.rootfs(),
        overlay: layer.and_then(|layer| layer.given.clone()),
        making: Making {
            pid_file: absolute(options.pid_file),
            no_pivot: options.no_pivot,
            no_new_keyring: options.no_new_keyring,
            is_deleted_at_end: options.is_deleted_at_end,
        },
    }
    .save(directory)?;
    // Kept: `exec` must not depend on what becomes of the bundle.
    bundle.write_config(directory)?;
    if !bundle.as_written {
        let mut container = load(id, directory)?;
        container.state.bundle = bundle.directory.clone();
        save(&container)?;
    }
    copy_up::fill(&bundle.copy_up, &bundle.rootfs(), child.pid)?;
    if bundle.has_new_network() {
        bring_loopback_up(child.pid)?;
    }
    match options.pid_file {
        Some(path) => write_whole(path, child.pid.to_string().as_bytes()),
        None => Ok(()),
    }
}

/// libcontainer leaves `lo` down in a new network namespace.
fn bring_loopback_up(init: Pid) -> Result<(), Error> {
    let open = |path: PathBuf| File::open(&path).map_err(Error::io("opening", path));
    let ours = open("/proc/self/ns/net".into())?;
    let theirs = open(format!("/proc/{init}/ns/net").into())?;
    let enter = |namespace: &File| {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(Error::kernel("entering a network namespace"))
    };
    enter(&theirs)?;
    let result = loopback::bring_up().map_err(Error::kernel("bringing up lo in the container"));
    enter(&ours)?;
    result
}

/// Lets a created container's init become the program. Only from a process without threads.
pub(crate) fn start(root: &Path, id: &str) -> Result<(), Error> {
    let located = locate(root, id)?;
    if located.status != Status::Created {
        return Err(located.wrong_status("only a created container can be started"));
    }
    let mut container = load(id, &located.directory)?;
    let _starting = Starting::begin(&located.directory)?;
    container
        .start()
        .map_err(Error::runtime(format!("starting container {id:?}")))
}

/// Notes that a created container runs, though nobody has started it: its init was made something else.
pub(crate) fn note_running(root: &Path, id: &str) -> Result<(), Error> {
    let located = locate(root, id)?;
    let mut container = load(id, &located.directory)?;
    container.set_status(ContainerStatus::Running);
    save(&container)
}

/// Creates the container's view of libcontainer from its state.
pub(super) fn load(id: &str, directory: &Path) -> Result<Container, Error> {
    let directory = fs::canonicalize(directory).map_err(Error::io("opening", directory))?;
    let load = || Container::load(directory.clone());
    let loaded = load().or_else(|error| {
        // It may have been half written, which ours waits for.
        match locate::load_state(&directory, id, &directory) {
            Ok(_) => load(),
            Err(_) => Err(error),
        }
    });
    loaded.map_err(Error::runtime(format!(
        "reading the state of container {id:?}"
    )))
}

pub(super) fn save(container: &Container) -> Result<(), Error> {
    container.save().map_err(Error::runtime(format!(
        "writing the state of container {:?}",
        container.id()
    )))
}

pub(super) fn absolute(path: Option<&Path>) -> Option<PathBuf> {
    path.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
}

/// Properties of the calling process that libcontainer changes on the way: a command that goes on, as `run` in the
/// foreground, must not keep them.
#[derive(Debug)]
pub(super) struct Caller {
    dumpable: bool,
    oom_score_adj: Option<String>,
}

const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

impl Caller {
    pub(super) fn remember() -> Caller {
        let dumpable = prctl::get_dumpable().unwrap_or(true);
        Caller {
            dumpable,
            oom_score_adj: fs::read_to_string(OOM_SCORE_ADJ).ok(),
        }
    }

    /// Best effort: lowering the score needs a privilege that root may lack.
    pub(super) fn restore(self) {
        let _ = prctl::set_dumpable(self.dumpable);
        if let Some(score) = self.oom_score_adj
            && fs::read_to_string(OOM_SCORE_ADJ).is_ok_and(|now| now != score)
        {
            let _ = fs::write(OOM_SCORE_ADJ, score.trim_end());
        }
    }
}

/// The configuration that a container was created with.
pub(super) fn configuration(located: &Located) -> Result<Bundle, Error> {
    Bundle::load(&located.directory, &located.id)
}
