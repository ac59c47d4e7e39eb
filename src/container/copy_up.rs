//! `tmpcopyup`, runc's mount option that podman uses: a tmpfs that starts with the content of the directory it
//! covers. libcontainer would hand the word to the kernel, which does not know it.

use std::fs::{self, File, FileTimes, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{
    FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown, symlink,
};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;

use super::Error;
use crate::kernel::confined;

const OPTION: &str = "tmpcopyup";

/// Takes the option away from the mounts that have it; returns their destinations.
pub(super) fn take(spec: &mut Spec) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let mut options = mount.options().clone().unwrap_or_default();
        let before = options.len();
        options.retain(|option| option != OPTION);
        if options.len() != before {
            mount.set_options(Some(options));
            found.push(mount.destination().clone());
        }
    }
    found
}

/// Copies what the root directory holds at these places into the mounts that cover them in the container of `init`,
/// whose program does not run yet.
pub(super) fn fill(destinations: &[PathBuf], rootfs: &Path, init: Pid) -> Result<(), Error> {
    if destinations.is_empty() {
        return Ok(());
    }
    let open = |path: PathBuf| File::open(&path).map_err(Error::io("opening", path));
    let below = open(rootfs.to_owned())?;
    let above = open(format!("/proc/{init}/root").into())?;
    for destination in destinations {
        let what = |what: &str| {
            Error::kernel(format!("{OPTION}: opening {}{what}", destination.display()))
        };
        let from = confined::open_directory(below.as_fd(), destination).map_err(what(""))?;
        let to = confined::open_directory(above.as_fd(), destination)
            .map_err(what(" in the container"))?;
        // Through the descriptors: nothing on the way to them is looked up again.
        let path = |fd: &dyn AsRawFd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let (from, to) = (path(&from), path(&to));
        let copied = copy_entries(&from, &to)
            .and_then(|()| take_over(&fs::metadata(&from)?, &File::open(&to)?));
        copied.map_err(Error::io("copying into the tmpfs on", destination))?;
    }
    Ok(())
}

fn copy_entries(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    let kind = metadata.file_type();
    if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
        return lchown(to, Some(metadata.uid()), Some(metadata.gid()));
    }
    if kind.is_dir() {
        fs::create_dir(to)?;
        copy_entries(from, to)?;
        return take_over(&metadata, &File::open(to)?);
    }
    if kind.is_file() {
        let mut new = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to)?;
        io::copy(&mut File::open(from)?, &mut new)?;
        return take_over(&metadata, &new);
    }
    let kind = if kind.is_fifo() {
        SFlag::S_IFIFO
    } else if kind.is_char_device() {
        SFlag::S_IFCHR
    } else if kind.is_block_device() {
        SFlag::S_IFBLK
    } else {
        SFlag::S_IFSOCK
    };
    mknod(to, kind, Mode::empty(), metadata.rdev())?;
    lchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())
}

/// Owner first: changing it clears the set-user-ID bit.
fn take_over(metadata: &fs::Metadata, file: &File) -> io::Result<()> {
    fchown(file, Some(metadata.uid()), Some(metadata.gid()))?;
    file.set_permissions(fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    file.set_times(
        FileTimes::new()
            .set_accessed(metadata.accessed()?)
            .set_modified(metadata.modified()?),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_copied_with_modes_links_and_times() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::write(from.join("sub/file"), "content").unwrap();
        fs::set_permissions(from.join("sub/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o500)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        mknod(
            &from.join("fifo"),
            SFlag::S_IFIFO,
            Mode::from_bits_truncate(0o640),
            0,
        )
        .unwrap();
        fs::create_dir(&to).unwrap();
        copy_entries(&from, &to).unwrap();
        for name in ["sub", "sub/file", "link", "fifo"] {
            let (old, new) = (
                fs::symlink_metadata(from.join(name)),
                fs::symlink_metadata(to.join(name)),
            );
            let (old, new) = (old.unwrap(), new.unwrap());
            assert_eq!(
                (old.mode(), old.uid(), old.len()),
                (new.mode(), new.uid(), new.len()),
                "{name}"
            );
        }
        let modified = |path: PathBuf| fs::metadata(path).unwrap().modified().unwrap();
        assert_eq!(
            modified(from.join("sub/file")),
            modified(to.join("sub/file"))
        );
        assert_eq!(fs::read(to.join("sub/file")).unwrap(), b"content");
        assert_eq!(
            fs::read_link(to.join("link")).unwrap(),
            Path::new("/nowhere")
        );
    }
}
