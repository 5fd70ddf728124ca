//! The modification times and sizes of imported files. A change means that a new import would give another result.

use std::fs::{self, Metadata};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

/// The state of a set of files at one moment, in an anonymous file. Another process can check it.
#[derive(Debug)]
pub struct ImportedFiles(fs::File);

impl ImportedFiles {
    /// Reads the state of the files. Files that cannot be read are left out.
    pub fn take<'a>(paths: impl IntoIterator<Item = &'a Path>) -> io::Result<Self> {
        let mut text = Vec::new();
        for path in paths {
            if let Ok(metadata) = fs::metadata(path) {
                text.extend_from_slice(stamp(&metadata).as_bytes());
                text.extend_from_slice(path.as_os_str().as_bytes());
                text.push(0);
            }
        }
        let mut file = fs::File::from(rustix::fs::memfd_create(c"ferro-snapshot", MemfdFlags::CLOEXEC)?);
        file.write_all(&text)?;
        Ok(Self(file))
    }

    /// The first file that has changed or is gone; `None` if none has.
    pub fn find_changed(&self) -> io::Result<Option<PathBuf>> {
        let mut file = &self.0;
        file.rewind()?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        for entry in text.split(|byte| *byte == 0).filter(|entry| !entry.is_empty()) {
            let at = memchr::memchr(b'/', entry).ok_or(io::ErrorKind::InvalidData)?;
            let path = PathBuf::from(std::ffi::OsString::from_vec(entry[at..].to_vec()));
            if !fs::metadata(&path).is_ok_and(|metadata| stamp(&metadata).as_bytes() == &entry[..at]) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

/// Modification time and size as text without a slash.
fn stamp(metadata: &Metadata) -> String {
    format!("{}.{} {} ", metadata.mtime(), metadata.mtime_nsec(), metadata.size())
}

impl From<OwnedFd> for ImportedFiles {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsFd for ImportedFiles {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_a_longer_and_a_deleted_file_are_found() {
        let folder = std::env::temp_dir().join(format!("ferro-snapshot-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("folder");
        let paths: Vec<PathBuf> = ["a", "b c", "missing"].iter().map(|name| folder.join(name)).collect();
        for path in &paths[..2] {
            fs::write(path, "1").expect("written");
        }
        let take = || ImportedFiles::take(paths.iter().map(PathBuf::as_path)).expect("snapshot");
        let snapshot = take();
        assert_eq!(snapshot.find_changed().expect("checked"), None);
        let file = fs::File::options().write(true).open(&paths[1]).expect("open");
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("time");
        assert_eq!(snapshot.find_changed().expect("checked"), Some(paths[1].clone()));
        let snapshot = take();
        fs::write(&paths[1], "12").expect("written");
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("time");
        assert_eq!(snapshot.find_changed().expect("checked"), Some(paths[1].clone()), "the size has changed");
        let snapshot = take();
        fs::remove_file(&paths[0]).expect("removed");
        assert_eq!(snapshot.find_changed().expect("checked"), Some(paths[0].clone()));
        fs::remove_dir_all(&folder).expect("removed");
    }
}
