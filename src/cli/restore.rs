//! `snapback restore`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;

use super::create::Overlay;
use super::delete::delete;
use super::foreground::{Signals, attend};
use super::output::print;
use super::target::{absolute, checkpoint_name, finish, report};
use super::{Global, Status, UsageError};
use crate::container::create::{self, Child, Options};
use crate::container::overlay::Place;
use crate::image::Opened;
use crate::keeper::protocol::Request;
use crate::keeper::{Client, Errand, Identity};
use crate::outcome::Report;
use crate::{container, restore};

/// Make a container of an image that `persist` or `checkpoint --image-path` wrote
///
/// The container gets namespaces, mounts and cgroups of its bundle, as `create` makes them, and in it the processes of the
/// image, with their PIDs, memory, descriptors and timers as they were, and the files that the image has. It has a checkpoint in RAM then, to which `rollback` goes
/// back like to any other. Connections to the outside are reset.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback restore --image-path /var/lib/web.img --bundle /bundles/web -d web
  snapback restore --image-path web.img --overlay -d web     its files were in an overlay of `run --overlay`
  snapback restore --image-path web.img --check web          tell whether it can be done, and do nothing
  snapback restore --image-path web.img --verify -d web      compare all of it with the image before it runs

Exit status: 0 done, 1 error, 2 usage, 3 refused (there is no such container then); in the foreground that of the program.")]
pub(crate) struct Restore {
    /// Directory of the image
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory of the bundle
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Do not stay with the container
    #[arg(short, long)]
    detach: bool,
    /// File to write the PID of the container's init to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Socket that gets the terminal of a container that has one
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Name of the checkpoint in RAM; that of the image if not given
    #[arg(long, value_name = "NAME", value_parser = checkpoint_name)]
    name: Option<String>,
    /// Compare every page and every object with the image before anything runs
    #[arg(long)]
    verify: bool,
    /// Only tell whether it can be done
    #[arg(long)]
    check: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    /// Enter the root by moving the mount instead of pivot_root(2)
    #[arg(long)]
    no_pivot: bool,
    /// Taken as runc does and not needed: nothing is written
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    #[command(flatten)]
    overlay: Overlay,
    #[command(flatten)]
    of_criu: OfCriu,
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// What runc passes on to CRIU, and is so here in any case.
#[derive(Debug, Args)]
struct OfCriu {
    /// Taken and not needed: connections inside are kept, those to the outside reset
    #[arg(long)]
    tcp_established: bool,
    /// Taken and not needed: unix sockets inside are kept
    #[arg(long)]
    ext_unix_sk: bool,
    /// Taken and not needed
    #[arg(long)]
    shell_job: bool,
    /// Taken and not needed: file locks are kept
    #[arg(long)]
    file_locks: bool,
    /// Taken and not needed: the cgroup is made as the bundle says
    #[arg(long, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,
    /// Taken and not needed: orphans are not waited for
    #[arg(long)]
    no_subreaper: bool,
}

pub(crate) fn run(global: &Global, args: Restore) -> anyhow::Result<Status> {
    let began = Instant::now();
    let image_path = absolute(&args.image_path)?;
    let name = check(&image_path, false)?;
    let name = args.name.clone().unwrap_or(name);
    if args.check {
        print("it can be restored\n")?;
        return Ok(Status::Done);
    }
    let wanted = Wanted {
        id: &args.id,
        bundle: &args.bundle,
        name: &name,
        detach: args.detach,
        pid_file: args.pid_file.as_deref(),
        console_socket: args.console_socket.as_deref(),
        no_pivot: args.no_pivot,
        overlay: args.overlay.place(),
        verify: args.verify,
        is_lent: false,
        json: args.json,
    };
    match wanted.make(global, &image_path, began)? {
        Made::Ended(status) => Ok(status),
        Made::Runs(runs) => runs.attend(global, &args.id),
    }
}

/// The container that is to be made of an image.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) id: &'a str,
    pub(super) bundle: &'a Path,
    /// The name of its checkpoint.
    pub(super) name: &'a str,
    pub(super) detach: bool,
    pub(super) pid_file: Option<&'a Path>,
    pub(super) console_socket: Option<&'a Path>,
    pub(super) no_pivot: bool,
    pub(super) overlay: Option<Place<'a>>,
    pub(super) verify: bool,
    /// Pages may be in another container's checkpoint.
    pub(super) is_lent: bool,
    pub(super) json: bool,
}

/// What has become of it.
pub(super) enum Made {
    /// The command ends with this.
    Ended(Status),
    /// It runs, and is to be attended to.
    Runs(Runs),
}

/// A container that runs.
pub(super) struct Runs {
    child: Child,
    signals: Signals,
}

impl Runs {
    /// Stays with it until it ends, then deletes it.
    pub(super) fn attend(self, global: &Global, id: &str) -> anyhow::Result<Status> {
        let attended = attend(&self.child, &self.signals, None);
        let deleted = delete(&global.root, id, attended.is_err());
        let status = attended?;
        deleted?;
        Ok(status)
    }
}

impl Wanted<'_> {
    /// Makes it; on an error nothing is left of it. Only from a process without threads.
    pub(super) fn make(
        &self,
        global: &Global,
        image_path: &Path,
        began: Instant,
    ) -> anyhow::Result<Made> {
        if self.console_socket.is_some() && !self.detach {
            let message = "--console-socket makes sense only with --detach";
            return Err(UsageError(message.into()).into());
        }
        let signals = Signals::hold()?;
        let child = create::create(&Options {
            root: &global.root,
            again: None,
            is_deleted_at_end: !self.detach,
            id: self.id,
            bundle: self.bundle,
            console_socket: self.console_socket,
            pid_file: self.pid_file,
            preserve_fds: 0,
            no_pivot: self.no_pivot,
            no_new_keyring: false,
            overlay: self.overlay,
            mask: signals.before,
        })?;
        let made = self.fill(global, image_path, &child);
        let report = match (made, signals.interruption()) {
            (Ok(report), Ok(None)) => report,
            (made, interruption) => {
                delete(&global.root, self.id, true)?;
                let status = match (made, interruption) {
                    (_, Ok(Some(signal))) => Status::Program(128 + signal as u8),
                    (Err(error), _) => finish(self.json, self.name, began, Err(error))?,
                    (_, Err(error)) => return Err(error),
                    (Ok(_), Ok(None)) => Status::Done,
                };
                return Ok(Made::Ended(status));
            }
        };
        if !self.detach {
            return Ok(Made::Runs(Runs { child, signals }));
        }
        // What a runtime prints ends in the container's log where a monitor runs it.
        let status = match self.json || std::io::stdout().is_terminal() {
            true => finish(self.json, self.name, began, Ok(report))?,
            false => Status::Done,
        };
        Ok(Made::Ended(status))
    }

    /// Has a keeper make of the container what the image says.
    fn fill(&self, global: &Global, image_path: &Path, child: &Child) -> anyhow::Result<Report> {
        let errand = Errand {
            root: absolute(&global.root)?,
            target: Identity::look_up(child.pid.as_raw())?,
            cgroup: container::locate(&global.root, self.id)?.cgroup,
            outlives: self.detach,
            label: self.id.to_owned(),
        };
        let request = Request::Restore {
            name: self.name.to_owned(),
            from: image_path.to_owned(),
            verify: self.verify,
            lent: self.is_lent,
        };
        let response = Client::ask_or_start(&errand.directory(), &errand, &request)?;
        let report = report(response)?;
        create::note_running(&global.root, self.id)?;
        Ok(report)
    }
}

/// Whether a container can be made of the image, as far as that is to be seen in it; returns the checkpoint's name.
pub(super) fn check(image_path: &Path, is_lent: bool) -> anyhow::Result<String> {
    let what = || format!("reading the image in {}", image_path.display());
    let opened = match is_lent {
        true => Opened::open_lent(image_path),
        false => Opened::open(image_path),
    };
    let origin = restore::Origin::new(opened.with_context(what)?);
    match restore::check(&origin) {
        Ok(()) => Ok(origin.name().to_owned()),
        Err(restore::Error::Refused(refusal)) => {
            Err(anyhow::Error::from(refusal).context("refused, nothing was made"))
        }
        Err(error) => Err(anyhow::Error::from(error).context(what())),
    }
}
