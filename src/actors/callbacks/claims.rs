//! Which node tells a callback when several follow one log: the one that claims the job first. The
//! others look again later, and find that it was told or that the claim has lapsed.

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};

use super::name;
use crate::domain::ids::JobId;
use crate::media::blobs;
use crate::media::documents::Documents;

/// After this a claim counts for nothing: its node has died over it. Far longer than a request and
/// the writing of what came of it.
const LAPSES_AFTER: TimeDelta = TimeDelta::seconds(60);

/// The claims of all nodes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Claims(Documents);

impl Claims {
    pub fn new(documents: Documents) -> Self {
        Self(documents)
    }

    /// Claims a job for this node; false while it is another's. Where two find at once that a claim
    /// has lapsed, both may get it: a callback comes at least once.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn take(&self, job_id: JobId, now: DateTime<Utc>) -> Result<bool, blobs::Error> {
        let name = name(job_id);
        let note = now.to_rfc3339_opts(SecondsFormat::Millis, true).into_bytes();
        if self.0.create(&name, note.clone()).await? {
            return Ok(true);
        }
        // One that was given up meanwhile is gone: its node has told the callback.
        let Some(taken) = self.0.get(&name).await? else { return Ok(false) };
        let taken = std::str::from_utf8(&taken).ok().and_then(|at| at.parse().ok());
        if taken.is_some_and(|at: DateTime<Utc>| (now - at).abs() < LAPSES_AFTER) {
            return Ok(false);
        }
        self.0.delete(&name).await?;
        self.0.create(&name, note).await
    }

    /// Gives a claim up; one that stays for want of a store lapses.
    pub async fn give_up(&self, job_id: JobId) {
        if let Err(error) = self.0.delete(&name(job_id)).await {
            tracing::warn!(%job_id, %error, "a claim on a callback was not given up");
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::config::BlobStore;
    use crate::media::blobs::Blobs;

    #[tokio::test]
    async fn a_job_is_one_nodes_until_it_is_given_up_or_its_node_has_died() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
        let [one, other] = [0, 1].map(|_| Claims::new(blobs.documents("claims")));
        let (job, now) = (JobId(Uuid::from_u128(1)), DateTime::UNIX_EPOCH);
        assert!(one.take(job, now).await.unwrap());
        assert!(!other.take(job, now + TimeDelta::seconds(59)).await.unwrap());
        assert!(other.take(JobId(Uuid::from_u128(2)), now).await.unwrap(), "of another job");
        one.give_up(job).await;
        assert!(other.take(job, now).await.unwrap());
        let later = now + LAPSES_AFTER;
        assert!(one.take(job, later).await.unwrap(), "the other one has died");
        assert!(!other.take(job, later).await.unwrap());
    }
}
