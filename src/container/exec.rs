//! `exec`: another process in a running container.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::seccomp::is_notify;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::signal::SigSet;
use oci_spec::runtime::{Capability, LinuxCapabilities, Process, UserBuilder};

use super::config::{self, Bundle};
use super::create::{Caller, Child, absolute, configuration, prepare_inheritance};
use super::locate::{Located, Status, locate, write_whole};
use super::program::{Program, Restrictions};
use super::{Error, children};

/// What `exec` is told.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    /// The directory of the containers' states.
    pub(crate) root: &'a Path,
    pub(crate) id: &'a str,
    /// A file with the whole description of the process; what follows is for when there is none.
    pub(crate) process: Option<&'a Path>,
    pub(crate) args: &'a [String],
    /// `NAME=VALUE`, in addition to what the container's own process has.
    pub(crate) env: Vec<String>,
    pub(crate) cwd: Option<&'a Path>,
    pub(crate) user: Option<(u32, Option<u32>)>,
    pub(crate) additional_gids: &'a [u32],
    pub(crate) capabilities: &'a [String],
    pub(crate) no_new_privileges: bool,
    pub(crate) apparmor: Option<&'a str>,
    pub(crate) terminal: bool,
    /// The socket that gets the terminal.
    pub(crate) console_socket: Option<&'a Path>,
    /// Where its PID is written.
    pub(crate) pid_file: Option<&'a Path>,
    /// Number of descriptors from 3 on that the program inherits.
    pub(crate) preserve_fds: i32,
    /// Start it also in a paused container, where it will not run before that is resumed.
    pub(crate) ignore_paused: bool,
    /// A cgroup below the container's.
    pub(crate) cgroup: Option<&'a str>,
    /// The signal mask the program starts with.
    pub(crate) mask: SigSet,
}

/// The process to be started by `exec`, and whether it has a terminal.
#[derive(Debug)]
pub(crate) struct Prepared<'a> {
    options: Options<'a>,
    located: Located,
    bundle: Bundle,
    process: Process,
}

impl<'a> Prepared<'a> {
    /// Finds the container and puts the process's description together.
    pub(crate) fn new(options: Options<'a>) -> Result<Prepared<'a>, Error> {
        let located = locate(options.root, options.id)?;
        match located.status {
            Status::Running => (),
            Status::Paused if options.ignore_paused => (),
            Status::Paused => {
                return Err(located.wrong_status("resume it first, or use --ignore-paused"));
            }
            _ => return Err(located.wrong_status("container not running")),
        }
        let bundle = configuration(&located)?;
        let process = match options.process {
            Some(path) => read_process(path)?,
            None => describe(&options, &bundle)?,
        };
        Ok(Prepared {
            options,
            located,
            bundle,
            process,
        })
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.process.terminal().unwrap_or(false)
    }

    /// The socket that is to get the terminal, for a caller that makes one itself.
    pub(crate) fn with_console_socket<'b>(self, path: &'b Path) -> Prepared<'b>
    where
        'a: 'b,
    {
        Prepared {
            options: Options {
                console_socket: Some(path),
                ..self.options
            },
            ..self
        }
    }

    /// Starts it. Only from a process without threads. When it fails, nothing of it is left.
    pub(crate) fn start(self) -> Result<Child, Error> {
        // What libcontainer reads and leaves lying about goes into a directory of this one call.
        let place = self
            .located
            .directory
            .join(format!("exec-{}", std::process::id()));
        config::remove_directory(&place)?;
        let pid_file = self.options.pid_file;
        let started = self.start_in(&place).and_then(|child| match pid_file {
            Some(path) => write_whole(path, child.pid.to_string().as_bytes()).map(|()| child),
            None => Ok(child),
        });
        let removed = config::remove_directory(&place);
        started
            .and_then(|child| removed.map(|()| child))
            .inspect_err(|_| children::abandon())
    }

    fn start_in(self, place: &Path) -> Result<Child, Error> {
        let Prepared {
            options,
            located,
            mut bundle,
            mut process,
        } = self;
        let id = located.id.as_str();
        let seccomp = bundle
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.seccomp().clone());
        if seccomp.as_ref().is_some_and(is_notify) {
            return Err(Error::Unsupported(format!(
                "exec in container {id:?}: its seccomp profile asks a listener, which exec does not support"
            )));
        }
        let restrictions = Restrictions {
            seccomp,
            capabilities: process.capabilities().clone(),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
        };
        process.set_capabilities(None);
        if process.no_new_privileges() == Some(false) {
            process.set_no_new_privileges(None);
        }
        let process_file = place.join("process.json");
        let state = State {
            status: match located.status {
                Status::Paused => ContainerStatus::Paused,
                _ => ContainerStatus::Running,
            },
            bundle: place.to_owned(),
            ..located.state.clone()
        };
        let directory = place.join(id);
        fs::create_dir_all(&directory).map_err(Error::io("creating", &directory))?;
        state
            .save(&directory)
            .map_err(Error::runtime("writing a state"))?;
        let text = serde_json::to_vec(&process)
            .map_err(|error| Error::io("encoding", &process_file)(error.into()))?;
        fs::write(&process_file, text).map_err(Error::io("writing", &process_file))?;
        bundle.spec.set_process(Some(process));
        bundle.write_config(place)?;

        let caller = Caller::remember();
        prepare_inheritance(id, false)?;
        let built = ContainerBuilder::new(id.to_owned(), SyscallType::default())
            .with_executor(Program {
                mask: options.mask,
                restrictions: Some(restrictions),
            })
            .with_root_path(place)
            .map(|builder| {
                builder
                    .with_console_socket(absolute(options.console_socket))
                    .with_preserved_fds(options.preserve_fds)
                    .as_tenant()
                    .with_process(Some(&process_file))
                    .with_detach(true)
                    .with_ignore_paused(options.ignore_paused)
                    .with_sub_cgroup(options.cgroup.map(str::to_owned))
            })
            .and_then(|builder| builder.build());
        caller.restore();
        let pid = built.map_err(Error::runtime(format!("exec in container {id:?}")))?;
        Child::new(pid)
    }
}

fn read_process(path: &Path) -> Result<Process, Error> {
    let text = fs::read(path).map_err(Error::io("reading", path))?;
    let bad = |reason: String| Error::Config {
        path: path.to_owned(),
        reason,
    };
    let process: Process = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    match process.args().as_deref() {
        None | Some([]) => Err(bad("args is empty".into())),
        _ => Ok(process),
    }
}

/// The container's own process with what the command line says otherwise.
fn describe(options: &Options<'_>, bundle: &Bundle) -> Result<Process, Error> {
    let mut process = bundle.spec.process().clone().unwrap_or_default();
    if options.args.is_empty() {
        return Err(Error::Unsupported(
            "exec needs a command or --process".into(),
        ));
    }
    process.set_args(Some(options.args.to_vec()));
    process.set_terminal(Some(options.terminal));
    let mut env = process.env().clone().unwrap_or_default();
    for entry in &options.env {
        let name = entry.split('=').next().unwrap_or_default();
        env.retain(|old| old.split('=').next() != Some(name));
        env.push(entry.clone());
    }
    process.set_env(Some(env));
    if let Some(cwd) = options.cwd {
        process.set_cwd(PathBuf::from(cwd));
    }
    if options.no_new_privileges {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = options.apparmor {
        process.set_apparmor_profile(Some(profile.to_owned()));
    }
    if options.user.is_some() || !options.additional_gids.is_empty() {
        process.set_user(user(options, &process)?);
    }
    if !options.capabilities.is_empty() {
        let capabilities = process
            .capabilities()
            .clone()
            .unwrap_or_else(no_capabilities);
        process.set_capabilities(Some(with_added(capabilities, options.capabilities)?));
    }
    Ok(process)
}

fn user(options: &Options<'_>, process: &Process) -> Result<oci_spec::runtime::User, Error> {
    let old = process.user();
    let (uid, gid) = match options.user {
        Some((uid, gid)) => (uid, gid.unwrap_or(0)),
        None => (old.uid(), old.gid()),
    };
    let mut gids = if options.user.is_some() {
        Vec::new()
    } else {
        old.additional_gids().clone().unwrap_or_default()
    };
    gids.extend_from_slice(options.additional_gids);
    let builder = UserBuilder::default()
        .uid(uid)
        .gid(gid)
        .additional_gids(gids);
    let builder = match old.umask() {
        Some(umask) => builder.umask(umask),
        None => builder,
    };
    builder
        .build()
        .map_err(|error| Error::Unsupported(format!("--user: {error}")))
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    let empty = || Some(Default::default());
    none.set_bounding(empty());
    none.set_effective(empty());
    none.set_permitted(empty());
    none.set_inheritable(None);
    none.set_ambient(None);
    none
}

/// Adds capabilities by name to those a program can use. Not to the inheritable ones: CVE-2022-29162.
fn with_added(
    mut capabilities: LinuxCapabilities,
    names: &[String],
) -> Result<LinuxCapabilities, Error> {
    for name in names {
        let unknown = |_| Error::Unsupported(format!("--cap {name}: no such capability"));
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        let added = Capability::from_str(short).map_err(unknown)?;
        let with = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(added);
            Some(set)
        };
        capabilities.set_bounding(with(capabilities.bounding()));
        capabilities.set_effective(with(capabilities.effective()));
        capabilities.set_permitted(with(capabilities.permitted()));
    }
    Ok(capabilities)
}
