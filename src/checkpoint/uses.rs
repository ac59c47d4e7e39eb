//! Which files the processes of a tree have open, mapped, or live in.

use std::path::PathBuf;

use super::Result;
use crate::filesystem::{self, How, Use};
use crate::freeze::Stopped;
use crate::kernel::procfs;
use crate::memory::SpaceImage;
use crate::objects;

/// Finds them.
pub(crate) fn find(
    stopped: &Stopped,
    objects: &objects::Capture,
    images: &[SpaceImage],
) -> Result<Vec<Use>> {
    let mut found = Vec::new();
    let recorded = &objects.recorded;
    for (id, place) in recorded.first_places() {
        let common = &recorded.descriptions[&id].common;
        if matches!(
            common.file_type(),
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFIFO
        ) {
            let pid = nix::unistd::Pid::from_raw(place.pid);
            let link = procfs::path(pid, &format!("fd/{}", place.fd));
            let how = match common.file_type() {
                libc::S_IFIFO => How::Tied,
                _ => How::Open,
            };
            let holder = recorded.holder(place.pid);
            found.extend(look(link, format!("fd {}", place.fd), holder, how)?);
        }
    }
    for image in images {
        let holder = || {
            let process = stopped.process(image.pid);
            process.map_or_else(String::new, |process| process.holder())
        };
        let shared = image.layout.vmas.iter();
        for vma in shared.filter(|vma| vma.shared && !vma.is_special() && !vma.is_anonymous()) {
            let name = String::from_utf8_lossy(&vma.name);
            let link = format!("map_files/{:x}-{:x}", vma.start, vma.end);
            let link = procfs::path(image.pid, &link);
            found.extend(look(
                link,
                format!("mapping of {name}"),
                holder(),
                How::Mapped,
            )?);
        }
        for (name, what) in [
            ("cwd", "the working directory"),
            ("root", "the root directory"),
        ] {
            let link = procfs::path(image.pid, name);
            found.extend(look(link, what.into(), holder(), How::Tied)?);
        }
    }
    Ok(found)
}

/// `None`: it is not there.
fn look(link: PathBuf, what: String, holder: String, how: How) -> Result<Option<Use>> {
    match Use::look(link.clone(), what, holder, how) {
        Ok(using) => Ok(Some(using)),
        // Segments and other mappings have no file that can be had.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(filesystem::Error::File {
            what: "look at",
            path: link,
            error,
        }
        .into()),
    }
}
