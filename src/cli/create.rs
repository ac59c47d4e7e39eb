//! `create`: set a container up, its program waiting for `start`.

use std::path::PathBuf;

use clap::Args;

use super::delete::delete;
use super::foreground::Signals;
use super::{Global, Status};
use crate::container::create::{self, Options};
use crate::container::overlay::Place;

/// runc's options of `create`, and ours.
#[derive(Debug, Args)]
#[group(skip)]
#[command(after_help = OVERLAY_HELP)]
pub(crate) struct Create {
    #[command(flatten)]
    oci: liboci_cli::Create,
    #[command(flatten)]
    overlay: Overlay,
}

/// What `--help` of `create` and `run` ends with.
pub(super) const OVERLAY_HELP: &str = "\
Files go back in a rollback where what a container writes can be told from the rest. In a bundle whose root is a plain
directory it can't; with --overlay the container gets a layer of its own for all that it writes, and the bundle stays
as it is:

  snapback run --overlay -d -b /bundles/web web              layer in the state directory, gone with `delete`
  snapback run --overlay=/srv/web -d -b /bundles/web web     layer in /srv/web/upper, kept, and used again by the next

The state directory (--root) is often in memory, as /run is: for containers that write much name a directory on a disk.
It has to be on a file system that can hold an upper layer (ext4, XFS, btrfs, tmpfs) and be used by one container at a
time. The host does not see the mount; look at the container's files by /proc/PID/root.";

/// The option `--overlay`.
#[derive(Debug, Args)]
pub(super) struct Overlay {
    /// Put an overlay over the bundle's root directory: its writable layer in the state directory, or in DIR
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true)]
    overlay: Option<Option<PathBuf>>,
}

impl Overlay {
    pub(super) fn place(&self) -> Option<Place<'_>> {
        self.overlay.as_ref().map(|directory| match directory {
            Some(directory) => Place::Directory(directory),
            None => Place::State,
        })
    }
}

pub(super) fn run(global: &Global, args: &Create) -> anyhow::Result<Status> {
    let overlay = args.overlay.place();
    let args = &args.oci;
    let signals = Signals::hold()?;
    create::create(&Options {
        root: &global.root,
        again: None,
        id: &args.container_id,
        bundle: &args.bundle,
        console_socket: args.console_socket.as_deref(),
        pid_file: args.pid_file.as_deref(),
        preserve_fds: args.preserve_fds,
        no_pivot: args.no_pivot,
        no_new_keyring: args.no_new_keyring,
        is_deleted_at_end: false,
        overlay,
        mask: signals.before,
    })?;
    finished(global, &args.container_id, &signals)
}

/// The end of a command that leaves a container behind: none if it was told to stop meanwhile.
pub(super) fn finished(global: &Global, id: &str, signals: &Signals) -> anyhow::Result<Status> {
    match signals.interruption()? {
        Some(signal) => {
            delete(&global.root, id, true)?;
            Ok(Status::Program(128 + signal as u8))
        }
        None => Ok(Status::Done),
    }
}
