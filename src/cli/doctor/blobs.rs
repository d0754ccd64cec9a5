//! Whether the store has the bytes of every file, and what it has besides.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::{Doctoring, Verdict, few};
use crate::cli::layout;
use crate::media::blobs::Blobs;
use crate::views::{self, Referring};

const CHECK: &str = "blobs";

/// A file whose bytes are not there, or are others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Faulty {
    file_id: Uuid,
    user_id: String,
    sha256: String,
    /// How many it should have.
    bytes: u64,
    /// How many lie under its hash; none where nothing does.
    found_bytes: Option<u64>,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file_id, user_id, bytes, found_bytes, .. } = self;
        write!(f, "{file_id} of {user_id}")?;
        match found_bytes {
            Some(found) => write!(f, " ({found} instead of {bytes} bytes)"),
            None => Ok(()),
        }
    }
}

impl Doctoring {
    /// `needed` are the blobs of all files with their sizes, as the read model has them.
    pub(super) async fn blobs(&mut self, store: &Blobs, needed: Option<HashMap<String, u64>>) {
        let sizes = match store.sizes().await {
            Ok(sizes) => sizes,
            Err(error) => return self.fault(CHECK, error),
        };
        let Some(needed) = needed else {
            return self.warning(CHECK, "not checked: the read model knows the files");
        };
        let wrong: BTreeMap<_, _> = needed
            .iter()
            .map(|(sha256, size)| (sha256, *size, sizes.get(sha256).copied()))
            .filter(|(_, size, found)| *found != Some(*size))
            .map(|(sha256, _, found)| (sha256.clone(), found))
            .collect();
        // Files may have been deleted meanwhile, and nobody needs their bytes any more.
        match files_of(&self.data_dir.join(layout::VIEWS), &wrong) {
            Ok(faulty) if faulty.is_empty() => {
                let bytes: u64 = needed.values().sum();
                self.ok(CHECK, format!("{} with {bytes} bytes, all there", needed.len()));
            }
            Ok(faulty) => self.faulty(&faulty),
            Err(error) => {
                let (count, named) = (wrong.len(), few(wrong.keys()));
                let says = format!("{count} are missing or of another size: {named}");
                self.fault(CHECK, format!("{says}; whose they are cannot be read: {error}"));
            }
        }
        let spare = sizes.into_iter().filter(|(sha256, _)| !needed.contains_key(sha256));
        let spare: BTreeMap<_, _> = spare.collect();
        let (count, bytes) = (spare.len(), spare.values().sum::<u64>());
        let says = format!("{count} with {bytes} bytes that no file refers to");
        let each = spare.iter().map(|(sha256, bytes)| json!({ "sha256": sha256, "bytes": bytes }));
        self.list("spare blobs", Verdict::Ok, says, each.collect());
    }

    fn faulty(&mut self, all: &[Faulty]) {
        let (missing, others): (Vec<_>, Vec<_>) =
            all.iter().partition(|file| file.found_bytes.is_none());
        let kinds = [("without their bytes", missing), ("whose bytes are of another size", others)];
        let kinds = kinds.iter().filter(|(_, files)| !files.is_empty());
        let says = kinds.map(|(what, files)| {
            let (count, named) = (files.len(), few(files.iter()));
            format!("{count} files {what}: {named}")
        });
        let says = says.collect::<Vec<_>>().join("; ");
        let details = all.iter().map(|file| json!(file)).collect();
        self.list(CHECK, Verdict::Fault, says, details);
    }
}

/// Those who refer to these blobs now, in the order of their ids; each blob with how many bytes there
/// are of it.
fn files_of(
    views: &Path,
    blobs: &BTreeMap<String, Option<u64>>,
) -> Result<Vec<Faulty>, views::Error> {
    if blobs.is_empty() {
        return Ok(Vec::new());
    }
    let referring = views::referring(views, blobs.keys())?.into_iter();
    let mut files: Vec<_> = referring
        .map(|Referring { file_id, user_id, sha256, size }| Faulty {
            file_id: file_id.0,
            user_id: user_id.to_string(),
            found_bytes: blobs.get(&sha256).copied().flatten(),
            sha256,
            bytes: size,
        })
        .collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::cli::backup::files::place;
    use crate::config::BlobStore;
    use crate::views::{Views, peek};

    fn hash(text: &str) -> String {
        hex::encode(Sha256::digest(text))
    }

    /// Something lies in the store under the hash of a text.
    fn store(data_dir: &Path, text: &str, bytes: &str) {
        let path = place(data_dir, &hash(text));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// The read model of a data directory, with these files: whose each is, and its text.
    fn files(data_dir: &Path, files: &[(&str, &str)]) {
        let path = data_dir.join(layout::VIEWS);
        drop(Views::open(&path).unwrap());
        let sql = Connection::open(&path).unwrap();
        let insert = "INSERT INTO files (position, file_id, user_id, filename, content_type, size, \
                      sha256, metadata, created_at) VALUES (?1, ?2, ?3, '', '', ?4, ?5, '{}', 0)";
        for (nth, (user, text)) in (1_u32..).zip(files) {
            let id = Uuid::from_u128(nth.into()).into_bytes();
            let size = i64::try_from(text.len()).unwrap();
            sql.execute(insert, (nth, id, user, size, hash(text))).unwrap();
        }
    }

    async fn findings(data_dir: &Path, needed: HashMap<String, u64>) -> Doctoring {
        let store = Blobs::open_for_reading(&BlobStore::File, data_dir).unwrap();
        let mut doctoring = Doctoring { data_dir: data_dir.to_owned(), findings: Vec::new() };
        doctoring.blobs(&store, Some(needed)).await;
        doctoring
    }

    #[tokio::test]
    async fn files_are_named_with_their_owners_and_missing_bytes_are_told_from_too_few() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path();
        let stored = [("ada", "whole"), ("eve", "lost"), ("bob", "short"), ("ada", "lost")];
        files(place, &stored);
        store(place, "whole", "whole");
        store(place, "short", "sh");
        for spare in ["spare", "spared"] {
            store(place, spare, spare);
        }
        let needed = peek(&place.join(layout::VIEWS)).unwrap().unwrap().blobs;
        let found = findings(place, needed.clone()).await.findings;
        let [blobs, spare] = &found[..] else { panic!("{found:?}") };
        let id = Uuid::from_u128;
        assert_eq!(
            (blobs.verdict, blobs.says.as_str()),
            (
                Verdict::Fault,
                &*format!(
                    "2 files without their bytes: {} of eve, {} of ada; 1 files whose bytes are of \
                     another size: {} of bob (2 instead of 5 bytes)",
                    id(2),
                    id(4),
                    id(3)
                )
            )
        );
        let lost = |nth, user| {
            json!({ "file_id": id(nth), "user_id": user, "sha256": hash("lost"), "bytes": 4,
                    "found_bytes": null })
        };
        let short = json!({ "file_id": id(3), "user_id": "bob", "sha256": hash("short"),
                            "bytes": 5, "found_bytes": 2 });
        assert_eq!(blobs.details, [lost(2, "eve"), short, lost(4, "ada")]);
        assert_eq!(spare.says, "2 with 11 bytes that no file refers to");
        let mut each = [("spare", 5), ("spared", 6)]
            .map(|(text, bytes)| json!({ "sha256": hash(text), "bytes": bytes }));
        each.sort_by_key(|it| it["sha256"].to_string());
        assert_eq!(spare.details, each);

        store(place, "lost", "lost");
        store(place, "short", "short");
        let found = findings(place, needed).await.findings;
        assert_eq!((found[0].verdict, found[0].details.len()), (Verdict::Ok, 0));
        assert_eq!(found[0].says, "3 with 14 bytes, all there");
    }

    #[tokio::test]
    async fn what_was_deleted_meanwhile_is_missed_by_nobody_and_of_many_some_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let many: Vec<_> = (0..25).map(|number| format!("text {number:02}")).collect();
        let of_ada: Vec<_> = many.iter().map(|text| ("ada", text.as_str())).collect();
        files(dir.path(), &of_ada);
        let mut needed = peek(&dir.path().join(layout::VIEWS)).unwrap().unwrap().blobs;
        needed.insert(hash("deleted"), 7);
        let found = findings(dir.path(), needed).await.findings;
        let (says, details) = (&found[0].says, &found[0].details);
        assert!(says.starts_with("25 files without their bytes: "), "{says}");
        assert!(says.ends_with(" and 5 more"), "{says}");
        assert_eq!((says.matches(" of ada").count(), details.len()), (20, 25));
        let needed = HashMap::from([(hash("deleted"), 7)]);
        assert_eq!(findings(dir.path(), needed).await.findings[0].verdict, Verdict::Ok);
    }
}
