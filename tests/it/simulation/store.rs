//! An object store in memory that forgets to answer, and whose files have the time of the
//! simulation.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use t2m::clock::Clock;

use super::dice::Faults;

/// Shared by all nodes.
#[derive(Debug)]
pub struct SimulatedStore {
    inner: Arc<InMemory>,
    pub faults: Faults,
    clock: Clock,
    written: Mutex<BTreeMap<Path, DateTime<Utc>>>,
}

impl SimulatedStore {
    pub fn new(faults: Faults, clock: Clock) -> Arc<Self> {
        let (inner, written) = Default::default();
        Arc::new(Self { inner, faults, clock, written })
    }

    /// Whether something lies there, whatever goes wrong.
    pub async fn holds(&self, path: &str) -> bool {
        self.inner.head(&Path::from(path)).await.is_ok()
    }

    /// What lies under there, likewise.
    pub async fn under(&self, folder: &str) -> Vec<String> {
        let listed = self.inner.list(Some(&Path::from(folder)));
        listed.filter_map(async |found| Some(found.ok()?.location.to_string())).collect().await
    }

    async fn reached(&self, what: &str, path: &Path) -> Result<()> {
        let mut dice = self.faults.dice(&format!("{what} {path}"));
        self.faults.delay(&mut dice).await;
        if self.faults.strike(&mut dice) && dice.percent(30) { Err(lost()) } else { Ok(()) }
    }

    fn date(&self, path: &Path) {
        self.written.lock().unwrap().insert(path.clone(), self.clock.now());
    }

    fn dated(&self, mut found: ObjectMeta) -> ObjectMeta {
        if let Some(written) = self.written.lock().unwrap().get(&found.location) {
            found.last_modified = *written;
        }
        found
    }
}

fn lost() -> Error {
    Error::Generic { store: "simulated", source: "the answer was lost".into() }
}

impl std::fmt::Display for SimulatedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("simulated")
    }
}

#[async_trait::async_trait]
impl ObjectStore for SimulatedStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.reached("put", location).await?;
        let done = self.inner.put_opts(location, payload, options).await?;
        self.date(location);
        // Written, and the answer lost.
        self.reached("answer", location).await?;
        Ok(done)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.reached("get", location).await?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        // Without faults of its own: a deletion that failed and one that was never asked for leave
        // the same behind, and the others' failures break off what would have asked.
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let written = self.written.lock().unwrap().clone();
        let dated = move |found: Result<ObjectMeta>| {
            found.map(|mut found| {
                if let Some(at) = written.get(&found.location) {
                    found.last_modified = *at;
                }
                found
            })
        };
        self.inner.list(prefix).map(dated).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut listed = self.inner.list_with_delimiter(prefix).await?;
        listed.objects = listed.objects.into_iter().map(|found| self.dated(found)).collect();
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.reached("copy", from).await?;
        self.inner.copy_opts(from, to, options).await?;
        self.date(to);
        self.reached("copied", from).await
    }
}
