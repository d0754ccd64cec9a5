//! How much of the disk a job fills.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The file that the job works on: brought by us, not made by the engine.
const SOURCE: &str = "source";

/// What the files below a job's directory fill, in bytes, but for its source. What comes and goes
/// meanwhile is counted or not; links are not followed. A file with holes counts as what it fills.
pub fn filled(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let entries = entries.flatten().filter(|entry| entry.file_name() != SOURCE);
    entries.map(|entry| of_path(&entry.path())).sum()
}

fn of_path(path: &Path) -> u64 {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            blocks(&meta) + entries.map(|entry| of_path(&entry.path())).sum::<u64>()
        }
        Ok(meta) => blocks(&meta),
        Err(_) => 0,
    }
}

/// They are of 512 bytes, whatever the file system's own are.
fn blocks(meta: &fs::Metadata) -> u64 {
    meta.blocks() * 512
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_below_is_counted_but_the_source_holes_and_what_links_lead_to() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(filled(dir.path()), 0);
        assert_eq!(filled(&dir.path().join("missing")), 0);
        let large = vec![7; 1 << 20];
        fs::write(outside.path().join("large"), &large).unwrap();
        fs::write(dir.path().join(SOURCE), &large).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("link")).unwrap();
        fs::File::create(dir.path().join("hole")).unwrap().set_len(1 << 30).unwrap();
        assert!(filled(dir.path()) < 1 << 16, "{}", filled(dir.path()));
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/large"), &large).unwrap();
        assert!(((1 << 20)..(1 << 20) + (1 << 17)).contains(&filled(dir.path())));
    }
}
