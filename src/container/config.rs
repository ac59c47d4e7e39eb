//! The bundle's `config.json`, and what of it has to be said otherwise for libcontainer to do what it means.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{Error, copy_up};

/// The configuration `spec` writes: what `runc spec` writes, with `sh` on a terminal in new PID, network, IPC, UTS
/// and mount namespaces.
pub const DEFAULT: &str = include_str!("default_config.json");

/// A bundle with its configuration made explicit.
#[derive(Debug)]
pub(super) struct Bundle {
    /// Its directory, absolute.
    pub(super) directory: PathBuf,
    /// The configuration, with an absolute root path, a cgroup, and `noNewPrivileges` absent instead of false.
    pub(super) spec: Spec,
    /// The container's cgroup below the root of every hierarchy.
    pub(super) cgroup: PathBuf,
    /// Where a tmpfs is to start with the content it covers.
    pub(super) copy_up: Vec<PathBuf>,
    /// Whether libcontainer would understand the file as it is in the bundle.
    pub(super) as_written: bool,
}

impl Bundle {
    /// Reads the bundle in `directory` for the container `id`.
    pub(super) fn load(directory: &Path, id: &str) -> Result<Bundle, Error> {
        let directory =
            fs::canonicalize(directory).map_err(Error::io("opening the bundle", directory))?;
        let path = directory.join("config.json");
        let text = fs::read(&path).map_err(Error::io("reading", &path))?;
        let refuse = |reason: String| Error::Config {
            path: path.clone(),
            reason,
        };
        let written: Spec =
            serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
        let mut spec = written.clone();

        let root = spec
            .root_mut()
            .as_mut()
            .ok_or_else(|| refuse("root is missing".into()))?;
        let rootfs = directory.join(root.path());
        let rootfs =
            fs::canonicalize(&rootfs).map_err(Error::io("opening the root directory", rootfs))?;
        root.set_path(rootfs);

        let linux = spec
            .linux_mut()
            .as_mut()
            .ok_or_else(|| refuse("linux is missing".into()))?;
        // Without a path libcontainer makes a directory named `:youki:ID` at the top of every hierarchy.
        let cgroup = linux
            .cgroups_path()
            .clone()
            .unwrap_or_else(|| Path::new("/snapback").join(id));
        if cgroup.components().any(|part| part.as_os_str() == "..") {
            return Err(refuse(format!(
                "linux.cgroupsPath {} leads upwards",
                cgroup.display()
            )));
        }
        linux.set_cgroups_path(Some(cgroup.clone()));

        let process = spec
            .process_mut()
            .as_mut()
            .ok_or_else(|| refuse("process is missing".into()))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(refuse("process.args is empty".into()));
        }
        // libcontainer takes any value for true when it decides when to install the seccomp filter.
        if process.no_new_privileges() == Some(false) {
            process.set_no_new_privileges(None);
        }
        let copy_up = copy_up::take(&mut spec);
        let as_written = copy_up.is_empty()
            && spec.linux() == written.linux()
            && spec.process() == written.process();
        Ok(Bundle {
            directory,
            spec,
            cgroup,
            copy_up,
            as_written,
        })
    }

    /// Writes the explicit configuration into `directory`, which takes the place of the bundle: links there lead to
    /// the bundle's other files, as hooks may look for them.
    pub(super) fn write_stand_in(&self, directory: &Path) -> Result<(), Error> {
        fs::create_dir(directory).map_err(Error::io("creating", directory))?;
        for entry in fs::read_dir(&self.directory).map_err(Error::io("reading", &self.directory))? {
            let entry = entry.map_err(Error::io("reading", &self.directory))?;
            let name = entry.file_name();
            if name != "config.json" {
                symlink(entry.path(), directory.join(&name))
                    .map_err(Error::io("linking into", directory))?;
            }
        }
        self.write_config(directory)
    }

    /// Writes the explicit configuration as `config.json` into `directory`.
    pub(super) fn write_config(&self, directory: &Path) -> Result<(), Error> {
        let path = directory.join("config.json");
        let text = serde_json::to_vec(&self.spec)
            .map_err(|error| Error::io("encoding", &path)(error.into()))?;
        fs::write(&path, text).map_err(Error::io("writing", path))
    }

    /// The container's root directory, absolute.
    pub(super) fn rootfs(&self) -> PathBuf {
        self.spec
            .root()
            .as_ref()
            .map(|root| root.path().clone())
            .unwrap_or_default()
    }

    /// Whether the bundle asks for a terminal.
    pub(super) fn has_terminal(&self) -> bool {
        self.spec
            .process()
            .as_ref()
            .and_then(|process| process.terminal())
            .unwrap_or(false)
    }

    /// Whether the container gets a network namespace of its own, which nobody has set up before.
    pub(super) fn has_new_network(&self) -> bool {
        let namespaces = self
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        namespaces.into_iter().flatten().any(|namespace| {
            namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none()
        })
    }
}

/// Whether the program of the bundle in `directory` wants a terminal.
pub(crate) fn has_terminal(directory: &Path, id: &str) -> Result<bool, Error> {
    Bundle::load(directory, id).map(|bundle| bundle.has_terminal())
}

/// Removes a directory tree; that it is not there is no error.
pub(super) fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io("removing", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
