//! What a worker hands in before it says that a job is done: which outputs a kind of job has, which
//! types each may be of, and where they are noted until the job is completed.
//!
//! The note of an output names the lease it came under, so that no other attempt's can take its
//! place, and nobody sees the bytes before a completion under the same lease refers to them.

use serde::{Deserialize, Serialize};

use crate::domain::ids::{JobId, LeaseId};
use crate::domain::job::Kind;
use crate::media::blobs::{self, Blobs};
use crate::media::documents::{Documents, Listed};

/// One of the outputs that a kind of job has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub name: &'static str,
    /// Its media types, with the file name that each gets.
    types: &'static [(&'static str, &'static str)],
}

const VIDEO: [Slot; 3] = [
    Slot {
        name: "video",
        types: &[
            ("video/mp4", "video.mp4"),
            ("video/webm", "video.webm"),
            ("video/x-matroska", "video.mkv"),
            ("video/quicktime", "video.mov"),
        ],
    },
    Slot {
        name: "poster",
        types: &[
            ("image/jpeg", "poster.jpg"),
            ("image/png", "poster.png"),
            ("image/webp", "poster.webp"),
        ],
    },
    Slot { name: "captions", types: &[("text/vtt", "captions.vtt")] },
];

const TRANSLATION: [Slot; 1] = [Slot {
    name: "translation",
    types: &[
        ("text/plain", "translation.txt"),
        ("application/x-subrip", "translation.srt"),
        ("text/vtt", "translation.vtt"),
    ],
}];

/// The outputs of a kind; the first is the one that it is about and must be there.
pub fn slots(kind: Kind) -> &'static [Slot] {
    match kind {
        Kind::Video => &VIDEO,
        Kind::Translation => &TRANSLATION,
    }
}

impl Slot {
    /// What a file of this type is called; nothing for a type that it may not have.
    pub fn filename(&self, content_type: &str) -> Option<&'static str> {
        self.types.iter().find(|(name, _)| *name == content_type).map(|(_, file)| *file)
    }

    /// The type of bytes that show none, as those of an engine's own container do: the declared one, or
    /// the one that is usual here. Captions are judged by what they say.
    pub fn unshown<'a>(&self, declared: Option<&'a str>) -> Option<&'a str> {
        let usual = self.types.first().map(|(name, _)| *name);
        declared
            .or(usual)
            .filter(|name| !name.starts_with("text/") && self.filename(name).is_some())
    }

    /// For people: which types it takes.
    pub fn types(&self) -> String {
        self.types.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }
}

/// Bytes that are durable and belong to nobody yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handed {
    pub content_type: String,
    /// In bytes.
    pub size: u64,
    pub sha256: String,
}

/// The notes of outputs whose jobs are not completed.
#[derive(Debug, Clone)]
pub struct Outputs(Documents);

impl Outputs {
    pub fn new(blobs: &Blobs) -> Self {
        Self(blobs.documents("outputs"))
    }

    /// Notes an output durably; the same one again takes its place.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn note(
        &self,
        job_id: JobId,
        lease_id: LeaseId,
        slot: &Slot,
        handed: &Handed,
    ) -> Result<(), blobs::Error> {
        let text = serde_json::to_vec(handed).expect("strings and a number are always JSON");
        self.0.put(&name(job_id, lease_id, slot), text).await
    }

    /// What was handed in under a lease.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn of(
        &self,
        kind: Kind,
        job_id: JobId,
        lease_id: LeaseId,
    ) -> Result<Vec<(&'static Slot, Handed)>, blobs::Error> {
        let mut found = Vec::new();
        for slot in slots(kind) {
            let Some(text) = self.0.get(&name(job_id, lease_id, slot)).await? else { continue };
            // Written whole or not at all, so that what cannot be read is not ours.
            if let Ok(handed) = serde_json::from_slice(&text) {
                found.push((slot, handed));
            }
        }
        Ok(found)
    }

    /// Forgets what was handed in under a lease; a failure costs a little room.
    pub async fn forget(&self, kind: Kind, job_id: JobId, lease_id: LeaseId) {
        for slot in slots(kind) {
            if let Err(error) = self.0.delete(&name(job_id, lease_id, slot)).await {
                tracing::warn!(%job_id, %error, "the note of an output was not removed");
            }
        }
    }

    /// Forgets what was handed in for jobs that are over: their workers died with it.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn sweep(&self, is_over: impl Fn(JobId) -> bool) -> Result<(), blobs::Error> {
        let noted = self.noted().await?;
        self.sweep_these(noted, is_over).await
    }

    /// All notes that there are.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub async fn noted(&self) -> Result<Vec<Listed>, blobs::Error> {
        self.0.list().await
    }

    /// [`Outputs::sweep`] of the notes that there were at a time: later ones may be of a retry that
    /// `is_over` has not heard of.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn sweep_these(
        &self,
        noted: Vec<Listed>,
        is_over: impl Fn(JobId) -> bool,
    ) -> Result<(), blobs::Error> {
        for listed in noted {
            let job_id = listed.name.get(..36).and_then(|id| uuid::Uuid::try_parse(id).ok());
            if job_id.is_some_and(|id| is_over(JobId(id))) {
                self.0.delete(&listed.name).await?;
            }
        }
        Ok(())
    }
}

fn name(job_id: JobId, lease_id: LeaseId, slot: &Slot) -> String {
    format!("{job_id}.{}.{}", lease_id.0, slot.name)
}
