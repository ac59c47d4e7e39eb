//! `snapback checkpoint`

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::target::{Target, checkpoint_name, finish, report};
use super::to_disk::ToDisk;
use super::{Global, Status, persist, to_disk};
use crate::keeper::Client;
use crate::keeper::protocol::{FileOptions, KeepOptions, Request};

/// Take a checkpoint in RAM while the container keeps running
///
/// A keeper process is started with the first checkpoint of a container and holds its checkpoints until they are
/// released or the container ends. A checkpoint of the same name is replaced. Any number can be kept: each takes memory for what
/// has changed since the one that it came from.
///
/// Files go back as well: the container's writable layer (of an overlay), its tmpfs mounts, and named and anonymous
/// volumes of podman and Docker. The report says what is included and what is not, and why.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapback checkpoint web                    of the container `web`, under the name `default`
  snapback checkpoint --name clean web       under the name `clean`
  snapback checkpoint --pid 4711             of a process tree that something else started
  snapback checkpoint --json web             the report for programs
  snapback checkpoint --no-files web         processes alone: files stay as they are in a rollback
  snapback checkpoint --volume /data web     with what is mounted on /data in the container
  snapback checkpoint --name 17 --keep 50 web
                                             one of a series of which the latest 50 are kept
  snapback checkpoint --pin --name clean web never released to make room for others
  snapback checkpoint --max-bytes 2G web     older ones are released until all take no more than 2 GiB
  snapback checkpoint --image-path DIR web   to disk, and the container is ended, as runc does it

Exit status: 0 done, 1 error, 2 usage, 3 refused (nothing was touched).")]
pub(crate) struct Checkpoint {
    /// Name of the checkpoint
    #[arg(long, default_value = "default", value_parser = checkpoint_name)]
    name: String,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    /// Leave all files as they are in a rollback
    #[arg(long, conflicts_with = "volume")]
    no_files: bool,
    /// Take in what is mounted from the host on PATH, as the container sees it; may be given more than once
    #[arg(long, value_name = "PATH", value_parser = absolute)]
    volume: Vec<PathBuf>,
    /// Keep no more than N bytes (or N with K, M, G) of changed memory and of files for all checkpoints of the container: the
    /// oldest are released that are not pinned; refused if files alone need more
    #[arg(long, value_name = "N", value_parser = bytes)]
    max_bytes: Option<u64>,
    /// Keep no more than N checkpoints of the container besides pinned ones: the oldest are released
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    keep: Option<usize>,
    /// Never release this one to make room for others
    #[arg(long)]
    pin: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    to_disk: ToDisk,
}

/// Takes the path of a mount point.
fn absolute(text: &str) -> Result<PathBuf, String> {
    // As `mountinfo` has it: without a slash at the end.
    let path: PathBuf = PathBuf::from(text).components().collect();
    match path.is_absolute() {
        true => Ok(path),
        false => Err("it has to be absolute, as the container sees it".to_owned()),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("a number of checkpoints, at least 1".to_owned()),
    }
}

/// Takes a number of bytes with an optional binary unit.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['K', 'M', 'G', 'T']) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text, ""),
    };
    let shift = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => 0,
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a number, perhaps with K, M, G or T".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too many".to_owned())
}

pub(crate) fn run(global: &Global, args: Checkpoint) -> anyhow::Result<Status> {
    let began = Instant::now();
    if let Some(path) = &args.to_disk.image_path {
        let ended = to_disk::write(global, &args.target, &args.to_disk, path, args.json);
        // As runc says nothing; podman passes on what is said.
        return match ended {
            Ok(_) if !args.json => Ok(Status::Done),
            ended => persist::finish(args.json, &args.name, began, ended),
        };
    }
    let ended = args.target.running(global).and_then(|errand| {
        let request = Request::Checkpoint {
            name: args.name.clone(),
            files: FileOptions {
                include: !args.no_files,
                volumes: args.volume.clone(),
                max_bytes: args.max_bytes,
            },
            keep: KeepOptions {
                pin: args.pin,
                most: args.keep,
            },
        };
        report(Client::ask_or_start(
            &errand.directory(),
            &errand,
            &request,
        )?)
    });
    finish(args.json, &args.name, began, ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_bytes_have_units() {
        assert_eq!(bytes("17"), Ok(17));
        assert_eq!(bytes("2G"), Ok(2 << 30));
        for wrong in ["", "K", "-1", "1.5G", "1g", "99999999999999999T"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn paths_of_volumes_are_as_the_kernel_has_them() {
        assert_eq!(absolute("/data//x/"), Ok("/data/x".into()));
        assert!(absolute("data").is_err());
    }
}
