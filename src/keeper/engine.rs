//! The keeper's operations on a real tree.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use crate::engine::{self, Engine, RollbackOptions, Stream, TakeOptions, Target};
use crate::filesystem;
use crate::image::{Encoding, Inspection, Opened, Options, Summary};
use crate::keeper::Errand;
use crate::keeper::protocol::{Change, CheckpointInfo, Failure, FileOptions, KeepOptions};
use crate::keeper::server::Operations;
use crate::keeper::work::Work;
use crate::outcome::Report;
use crate::restore::Origin;

/// What attaches the engine to the errand's tree, on the thread that calls it.
pub fn attach(errand: &Errand) -> impl FnOnce() -> Result<Engine, Failure> + Send + 'static {
    let target = Target {
        pid: errand.target.pid,
        cgroup: errand.cgroup.clone(),
        label: errand.label.clone(),
        outlives: errand.outlives,
    };
    // Which files are to go back is told with each checkpoint.
    let files = filesystem::Options {
        include: false,
        store: errand.directory().above().to_owned(),
        ..filesystem::Options::default()
    };
    move || Engine::attach_with_files(target, files).map_err(Failure::from)
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Failure {
        let message = error.to_string();
        match error {
            engine::Error::Refused(refusal) => Failure::Refused { refusal },
            engine::Error::Lost { .. } => Failure::Lost { message },
            _ => Failure::Error { message },
        }
    }
}

impl Operations for Engine {
    fn checkpoint(
        &mut self,
        name: &str,
        files: &FileOptions,
        keep: KeepOptions,
    ) -> Result<Report, Failure> {
        choose_files(self, files);
        let options = TakeOptions {
            pin: keep.pin,
            keep: keep.most,
            max_bytes: files.max_bytes,
        };
        Ok(self.take_with(name, options)?)
    }

    fn move_out(
        &mut self,
        to: &Path,
        encoding: Encoding,
        files: &FileOptions,
    ) -> Result<Summary, Failure> {
        choose_files(self, files);
        let options = Options {
            encoding,
            ..Options::default()
        };
        Ok(Engine::move_out(self, to, options)?)
    }

    fn rollback(&mut self, name: &str, verify: bool) -> Result<Report, Failure> {
        Ok(Engine::rollback(self, name, RollbackOptions { verify })?)
    }

    fn diff(&mut self, name: &str) -> Result<Vec<Change>, Failure> {
        let changes = Engine::diff(self, name)?;
        Ok(changes.into_iter().map(change).collect())
    }

    fn inspect(&self, name: &str) -> Result<Inspection, Failure> {
        Ok(Engine::inspect(self, name)?)
    }

    fn persist(&mut self, name: &str, to: &Path, options: Options) -> Result<Work, Failure> {
        let persisting = Engine::persist(self, name, to, options)?;
        let progress = Arc::clone(persisting.progress());
        Ok(Work {
            progress,
            run: Box::new(move || {
                let done = persisting.run();
                done.map_err(|error| Failure::from(engine::Error::from(error)))
            }),
        })
    }

    fn restore(
        &mut self,
        name: &str,
        (from, is_lent): (&Path, bool),
        verify: bool,
    ) -> Result<Report, Failure> {
        let image = match is_lent {
            true => Opened::open_lent(from),
            false => Opened::open(from),
        };
        let origin = Origin::new(image.map_err(engine::Error::from)?);
        Ok(Engine::restore(
            self,
            &origin,
            name,
            RollbackOptions { verify },
        )?)
    }

    fn prepare_again(&mut self, name: &str) -> Result<[Option<Stream>; 3], Failure> {
        Ok(Engine::prepare_again(self, name)?)
    }

    fn make_again(&mut self, name: &str, root: i32, verify: bool) -> Result<Report, Failure> {
        let options = RollbackOptions { verify };
        Ok(Engine::make_again(self, name, root, options)?)
    }

    fn end_with_container(&mut self) -> Result<(), Failure> {
        Ok(Engine::end_with_container(self)?)
    }

    fn checkpoints(&self) -> Vec<CheckpointInfo> {
        Engine::checkpoints(self).into_iter().map(info).collect()
    }

    fn release(&mut self, name: Option<&str>) -> Result<(), Failure> {
        Ok(Engine::release(self, name)?)
    }

    fn held(&self) -> usize {
        Engine::checkpoints(self).len()
    }

    fn is_alive(&self) -> bool {
        Engine::is_alive(self)
    }

    fn can_come_back(&self) -> bool {
        Engine::can_come_back(self)
    }

    fn root(&self) -> i32 {
        Engine::root(self)
    }

    fn collect_deaths(&mut self) {
        Engine::collect_deaths(self);
    }
}

/// Which files go with the next checkpoint.
fn choose_files(engine: &mut Engine, files: &FileOptions) {
    let FileOptions {
        include,
        volumes,
        max_bytes,
    } = files.clone();
    engine.set_files(filesystem::Options {
        include,
        volumes,
        max_bytes,
        ..engine.files().clone()
    });
}

fn change(change: filesystem::Change) -> Change {
    Change {
        kind: change.kind,
        path: printable(&change.path),
        before: change.before,
        after: change.after,
    }
}

/// A path on one line, whatever its bytes are, from which they can be told.
fn printable(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' => text.push_str("\\x5c"),
                plain if !plain.is_control() => text.push(plain),
                control => {
                    let mut bytes = [0; 4];
                    for byte in control.encode_utf8(&mut bytes).bytes() {
                        text.push_str(&format!("\\x{byte:02x}"));
                    }
                }
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

fn info(info: engine::CheckpointInfo) -> CheckpointInfo {
    const PAGE: u64 = 4096;
    let since = info.taken_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let kinds = info.stats.by_kind.iter();
    CheckpointInfo {
        name: info.name,
        taken_at: since.as_secs_f64(),
        kinds: kinds
            .map(|(kind, stats)| (kind.name().to_owned(), stats.bytes))
            .collect(),
        header_bytes: info.stats.bytes,
        resident_bytes: info.resident_pages * PAGE,
        parent: info.parent,
        current: info.is_current,
        pinned: info.is_pinned,
        ended: info.has_ended,
        page_bytes: info.copied_pages * PAGE,
        copied_bytes: info.shared_bytes,
        file_bytes: info.file_bytes,
        durability: info.durability,
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn any_path_is_one_line() {
        let shown = |bytes| printable(Path::new(OsStr::from_bytes(bytes)));
        assert_eq!(shown("/ä b".as_bytes()), "/ä b");
        assert_eq!(shown(b"/a\nb\\c\xff/\x7f"), "/a\\x0ab\\x5cc\\xff/\\x7f");
    }
}
