//! `snapback fork`

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;

use super::create::Overlay;
use super::persist::summary;
use super::restore::{Made, Wanted, check};
use super::target::{Target, absolute, checkpoint_name};
use super::{Global, Status};
use crate::container;
use crate::image::Encoding;
use crate::keeper::protocol::Request;
use crate::keeper::{Client, Errand};

/// Make a second container of a checkpoint, which runs beside the first
///
/// It is made as `restore` does it, of the checkpoint in RAM, with network, cgroup and writable layer of its own; the first runs
/// on. Memory is copied. PIDs are those of the checkpoint, inside. Connections to the outside are reset in it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback fork -d web web-2                       of the checkpoint `default` of `web`
  snapback fork --name clean --overlay -d web web-2   with a layer of its own, as `web` has one

Exit status: 0 done, 1 error, 2 usage, 3 refused (there is no such container then); in the foreground that of the program.")]
pub(crate) struct Fork {
    /// Name of the checkpoint, in both
    #[arg(long, default_value = "default", value_parser = checkpoint_name)]
    name: String,
    /// Directory of the bundle; that of the first container if not given
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Do not stay with the container
    #[arg(short, long)]
    detach: bool,
    /// File to write the PID of the new container's init to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Compare every page and every object with the checkpoint before it runs
    #[arg(long)]
    verify: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    overlay: Overlay,
    /// The container with the checkpoint
    #[arg(value_name = "ID")]
    id: String,
    /// The new container
    #[arg(value_name = "NEW-ID")]
    new_id: String,
}

/// A directory for an image between two containers, gone with this.
struct Passing(PathBuf);

impl Passing {
    fn new(root: &Path, id: &str) -> anyhow::Result<Self> {
        let above = root.join(".forks");
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&above);
        made.with_context(|| format!("making {}", above.display()))?;
        Ok(Self(above.join(format!("{id}-{}", std::process::id()))))
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        // What is left is removed with the state directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Has the keeper of the first container write what its shadows have not, and lend the pages that they have.
fn lend(errand: &Errand, name: &str, to: &Path) -> anyhow::Result<()> {
    let request = Request::Persist {
        name: name.to_owned(),
        to: to.to_owned(),
        encoding: Encoding::Plain,
        called: None,
        lend: true,
    };
    let answer = Client::ask_and_watch(&errand.directory(), &request, &mut |_, _| {});
    summary(answer?).map(drop)
}

pub(crate) fn run(global: &Global, args: Fork) -> anyhow::Result<Status> {
    let began = Instant::now();
    let root = absolute(&global.root)?;
    let located = container::locate(&root, &args.id)?;
    let bundle = args.bundle.clone().unwrap_or(located.bundle);
    let image = Passing::new(&root, &args.id)?;
    let errand = Target::container(&args.id).known(global)?;
    lend(&errand, &args.name, &image.0)?;
    check(&image.0, true)?;
    let wanted = Wanted {
        id: &args.new_id,
        bundle: &bundle,
        name: &args.name,
        detach: args.detach,
        pid_file: args.pid_file.as_deref(),
        console_socket: None,
        no_pivot: false,
        overlay: args.overlay.place(),
        verify: args.verify,
        is_lent: true,
        json: args.json,
    };
    let made = wanted.make(global, &image.0, began)?;
    drop(image);
    match made {
        Made::Ended(status) => Ok(status),
        Made::Runs(runs) => runs.attend(global, &args.new_id),
    }
}
