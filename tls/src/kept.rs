//! What was made of files, made anew when they change.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak},
    thread,
    time::Duration,
};

use crate::{Certificate, TlsError, files::Read};

/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(2);
/// So long before its end a certificate is warned of, once.
const ENDS_SOON_SECONDS: i64 = 7 * 24 * 3600;

type Build<T> = Box<dyn Fn(&Read) -> Result<T, TlsError> + Send + Sync>;

/// A value made of files. A thread of its own looks at them, since file systems may hang.
pub(crate) struct Kept<T> {
    files: Vec<PathBuf>,
    build: Build<T>,
    current: RwLock<Arc<T>>,
    looked: Mutex<Looked>,
}

/// What the last looks found.
struct Looked {
    /// The files as they were last read, usable or not.
    read: Read,
    /// What was told of files that cannot be read.
    told: Option<String>,
    /// Of the first file.
    certificate: Option<Certificate>,
    warned_of_end: bool,
}

impl<T: Send + Sync + 'static> Kept<T> {
    /// The first file is the one whose certificate is told of.
    ///
    /// # Errors
    /// Files that cannot be read, or of which nothing can be made.
    pub fn load(
        files: Vec<PathBuf>,
        build: impl Fn(&Read) -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, TlsError> {
        let read = Read::all(&files)?;
        let current = RwLock::new(Arc::new(build(&read)?));
        let certificate = read.first(&files);
        let looked = Looked { read, told: None, certificate, warned_of_end: false };
        let (build, looked) = (Box::new(build), Mutex::new(looked));
        let kept = Arc::new(Self { files, build, current, looked });
        if !kept.files.is_empty() {
            kept.tell("certificate loaded");
            let weak = Arc::downgrade(&kept);
            let look = move || follow(&weak);
            let started = thread::Builder::new().name("certificates".into()).spawn(look);
            if let Err(source) = started {
                return Err(TlsError::Read { path: kept.files[0].clone(), source });
            }
        }
        Ok(kept)
    }

    pub fn current(&self) -> Arc<T> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over what the files hold now; says once what is wrong with them.
    pub fn look(&self) {
        match Read::all(&self.files) {
            Ok(read) => self.take(read),
            Err(error) => {
                let error = error.to_string();
                let told = self.looked().told.replace(error.clone());
                if told.as_ref() != Some(&error) {
                    kept_in_use(&error);
                }
            }
        }
        self.warn_of_end();
    }

    fn take(&self, read: Read) {
        let mut looked = self.looked();
        looked.told = None;
        if read == looked.read {
            return;
        }
        let built = (self.build)(&read);
        let certificate = read.first(&self.files);
        *looked = Looked { read, told: None, certificate, warned_of_end: false };
        drop(looked);
        match built {
            Ok(built) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(built);
                self.tell("certificate replaced");
            }
            Err(error) => kept_in_use(&error.to_string()),
        }
    }

    fn looked(&self) -> MutexGuard<'_, Looked> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: &str) {
        let looked = self.looked();
        let file = self.files[0].display();
        match &looked.certificate {
            Some(Certificate { subject, not_after, .. }) => {
                tracing::info!(%file, subject, not_after, "{what}");
            }
            None => tracing::info!(%file, "{what}"),
        }
        drop(looked);
        self.warn_of_end();
    }

    fn warn_of_end(&self) {
        let mut looked = self.looked();
        let Some(certificate) = &looked.certificate else { return };
        let left = certificate.seconds_left();
        if left > ENDS_SOON_SECONDS || looked.warned_of_end {
            return;
        }
        let (file, not_after) = (self.files[0].display(), &certificate.not_after);
        let what = if left > 0 { "certificate expires soon" } else { "certificate has expired" };
        tracing::warn!(
            %file, not_after,
            "{what}; replace the file (`lockstep certs issue`), it is read again without a restart"
        );
        looked.warned_of_end = true;
    }
}

fn kept_in_use(reason: &str) {
    tracing::warn!(reason, "certificate files cannot be used; those read before stay in use");
}

/// Looks again and again, for as long as somebody needs it.
fn follow<T: Send + Sync + 'static>(kept: &Weak<Kept<T>>) {
    loop {
        thread::sleep(LOOK);
        match kept.upgrade() {
            Some(kept) => kept.look(),
            None => return,
        }
    }
}
