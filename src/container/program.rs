//! The last steps of a container's process before it becomes the program.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use libcontainer::{capabilities, seccomp};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{fstat, major, minor};
use nix::unistd::{AccessFlags, access, dup2, execvp};
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};

use crate::kernel::disposition;

/// The `PATH` of a process that has none: execvp(3)'s own.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Starts the program, having put right what libcontainer leaves wrong. Runs in the container's process.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// The signal mask the program starts with: the caller's, not that of a command that waits for signals.
    pub(super) mask: SigSet,
    /// What libcontainer would not do for a process that joins a container.
    pub(super) restrictions: Option<Restrictions>,
}

/// The seccomp filter and capabilities of a process that joins a container. libcontainer ignores the container's
/// filter there, and once it has dropped the capabilities none can be installed; so both are done here.
#[derive(Debug, Clone)]
pub(super) struct Restrictions {
    pub(super) seccomp: Option<LinuxSeccomp>,
    pub(super) capabilities: Option<LinuxCapabilities>,
    pub(super) no_new_privileges: bool,
}

impl Restrictions {
    /// Puts them on this process. A filter needs `CAP_SYS_ADMIN` or `no_new_privs`: in the second case it is
    /// installed last, so that it need not allow what drops the capabilities.
    fn apply(&self) -> Result<(), ExecutorError> {
        if self.no_new_privileges {
            self.drop_capabilities()?;
            self.filter()
        } else {
            self.filter()?;
            self.drop_capabilities()
        }
    }

    fn filter(&self) -> Result<(), ExecutorError> {
        match &self.seccomp {
            Some(profile) => seccomp::initialize_seccomp(profile)
                .map(drop)
                .map_err(|error| {
                    ExecutorError::Other(format!("installing the seccomp filter: {error}"))
                }),
            None => Ok(()),
        }
    }

    fn drop_capabilities(&self) -> Result<(), ExecutorError> {
        match &self.capabilities {
            Some(wanted) => capabilities::drop_privileges(wanted, create_syscall().as_ref())
                .map_err(|error| ExecutorError::Other(format!("dropping capabilities: {error}"))),
            None => Ok(()),
        }
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let refuse = |reason| ExecutorValidationError::ArgValidationError(reason);
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| refuse("process is missing".into()))?;
        let name = process.args().as_ref().and_then(|args| args.first());
        let name = name.ok_or_else(|| refuse("process.args is empty".into()))?;
        find(name, process.env().as_deref().unwrap_or_default()).map_err(refuse)?;
        open_null_for_writing()
            .map_err(|error| refuse(format!("opening /dev/null in the container: {error}")))
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let args = process.args().as_deref().unwrap_or_default();
        let args: Vec<CString> = args
            .iter()
            .map(|arg| CString::new(arg.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(|_| ExecutorError::InvalidArg)?;
        let path = find(
            process
                .args()
                .as_ref()
                .and_then(|args| args.first())
                .ok_or(ExecutorError::InvalidArg)?,
            process.env().as_deref().unwrap_or_default(),
        )
        .map_err(ExecutorError::Other)?;
        let path = CString::new(path.into_os_string().into_encoded_bytes())
            .map_err(|_| ExecutorError::InvalidArg)?;

        if let Some(restrictions) = &self.restrictions {
            restrictions.apply()?;
        }
        let failed = |what: &'static str| {
            move |error: Errno| ExecutorError::Other(format!("{what}: {error}"))
        };
        for signal in [Signal::SIGPIPE, Signal::SIGCHLD] {
            disposition::set_default(signal).map_err(failed("resetting a signal"))?;
        }
        self.mask
            .thread_set_mask()
            .map_err(failed("setting the signal mask"))?;
        let error = execvp(&path, &args).unwrap_err();
        Err(ExecutorError::Other(format!("exec {path:?}: {error}")))
    }
}

/// The program that `name` means with this environment. The messages are runc's: podman tells the exit statuses 126
/// and 127 apart by them.
fn find(name: &str, env: &[String]) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(error) => Err(failure(name, &format!("stat {name}: {}", describe(error)))),
        };
    }
    let path = env
        .iter()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':') {
        // An empty element is the working directory: execvp(3).
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => (),
        }
    }
    let reason = if denied {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    };
    Err(failure(name, reason))
}

fn failure(name: &str, reason: &str) -> String {
    format!(
        "{}{}\": {reason}",
        super::error::PROGRAM,
        name.escape_default()
    )
}

fn describe(error: Errno) -> &'static str {
    match error {
        Errno::ENOENT => "no such file or directory",
        Errno::EACCES => "permission denied",
        Errno::EISDIR => "is a directory",
        other => other.desc(),
    }
}

fn executable(path: &Path) -> Result<(), Errno> {
    access(path, AccessFlags::X_OK)?;
    if path.is_dir() {
        Err(Errno::EISDIR)
    } else {
        Ok(())
    }
}

/// libcontainer opens the container's /dev/null again for every standard stream that is one, but for reading only.
fn open_null_for_writing() -> io::Result<()> {
    let is_null = |device: u64| major(device) == 1 && minor(device) == 3;
    let streams = (0..3).filter(|&fd| fstat(fd).is_ok_and(|stat| is_null(stat.st_rdev)));
    let streams: Vec<_> = streams.collect();
    if streams.is_empty() {
        return Ok(());
    }
    let null: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    if !is_null(null.metadata()?.rdev()) {
        return Err(io::Error::other("it is another device"));
    }
    for fd in streams {
        dup2(null.as_raw_fd(), fd)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn programs_are_found_as_execvp_does() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().to_str().unwrap();
        let file = place.path().join("tool");
        std::fs::write(&file, "").unwrap();
        let env = [format!("PATH=/nonexistent:{directory}")];
        let denied = find("tool", &env).unwrap_err();
        assert!(denied.contains("permission denied"), "{denied}");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o750)).unwrap();
        assert_eq!(find("tool", &env).unwrap(), file);
        assert_eq!(find(file.to_str().unwrap(), &[]).unwrap(), file);
        assert!(
            find("tool", &[])
                .unwrap_err()
                .contains("executable file not found in $PATH")
        );
        let missing = format!("{directory}/missing");
        assert!(
            find(&missing, &env)
                .unwrap_err()
                .contains("no such file or directory")
        );
        assert!(
            find(directory, &env)
                .unwrap_err()
                .contains("is a directory")
        );
    }
}
