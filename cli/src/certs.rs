//! `lockstep certs`: a private CA, and certificates of it for the processes of a cluster.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use time::{Duration, OffsetDateTime};
use tls::{CLUSTER_NAME, Certificate};

/// Clocks of two machines may differ by so much.
const BEFORE: Duration = Duration::hours(1);
/// Of the CA, in its folder.
const CA_CERT: &str = "ca.crt";
const CA_KEY: &str = "ca.key";

/// Flags of `certs`.
#[derive(Args)]
pub struct CertsArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a private CA: DIR/ca.crt and DIR/ca.key
    Init(InitArgs),
    /// Issues a certificate of that CA, in place of one of the same name: DIR/NAME.crt and .key
    Issue(IssueArgs),
    /// Prints who a certificate is for, and until when
    Show {
        /// A PEM file
        file: PathBuf,
    },
}

#[derive(Args)]
struct InitArgs {
    /// A folder, made if absent
    dir: PathBuf,
    /// Days until the CA expires
    #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u16).range(1..))]
    days: u16,
}

#[derive(Args)]
struct IssueArgs {
    /// The folder of the CA
    dir: PathBuf,
    /// Names the files, and whose certificate it is
    name: String,
    /// Host names and IP addresses by which clients reach the process, with commas between
    #[arg(long, value_name = "HOST,IP,...", value_delimiter = ',')]
    san: Vec<String>,
    /// Days until the certificate expires
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..))]
    days: u16,
    /// For a client of routers (`--tls-client-ca`): no process of the cluster takes it for one of
    /// theirs
    #[arg(long)]
    client: bool,
}

pub fn main(args: CertsArgs) -> Result<()> {
    match args.command {
        Command::Init(args) => init(&args),
        Command::Issue(args) => issue(&args),
        Command::Show { file } => show(&file),
    }
}

fn init(args: &InitArgs) -> Result<()> {
    let dir = &args.dir;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let (cert, key) = (dir.join(CA_CERT), dir.join(CA_KEY));
    if let Some(there) = [&cert, &key].into_iter().find(|path| path.exists()) {
        bail!("{} is there already: every certificate of it would be lost", there.display());
    }
    let secret = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = lasting(CertificateParams::default(), args.days);
    // A name of its own: two CAs can be told apart, and trusted side by side.
    let key_end: String =
        secret.public_key_raw().iter().rev().take(4).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = named(&format!("Lockstep cluster CA {key_end}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let made = params.self_signed(&secret)?;
    write(&key, &secret.serialize_pem(), 0o600)?;
    write(&cert, &made.pem(), 0o644)?;
    let (cert, key) = (cert.display(), key.display());
    crate::print(format_args!("{cert} for every machine; {key} stays here"))
}

fn issue(args: &IssueArgs) -> Result<()> {
    let IssueArgs { dir, name, .. } = args;
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(fine) || name == "ca" {
        bail!("{name:?} names no certificate; use letters, digits, dots and dashes, and not ca");
    }
    let (cert, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    let issuer = issuer(dir)?;
    let mut names: Vec<String> = args.san.iter().map(|name| name.trim().to_owned()).collect();
    if !args.client {
        names.push(CLUSTER_NAME.to_owned());
    }
    let params = CertificateParams::new(names)
        .with_context(|| format!("--san {} is no list of names", args.san.join(",")))?;
    let mut params = lasting(params, args.days);
    params.distinguished_name = named(name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if !args.client {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    let secret = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let made = params.signed_by(&secret, &issuer)?;
    write(&key, &secret.serialize_pem(), 0o600)?;
    write(&cert, &made.pem(), 0o644)?;
    crate::print(format_args!("{} {}", cert.display(), key.display()))
}

/// The CA of a folder.
fn issuer(dir: &Path) -> Result<Issuer<'static, KeyPair>> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).with_context(|| {
            format!("cannot read {}; `lockstep certs init` makes it", path.display())
        })
    };
    let secret = read(CA_KEY)?;
    let secret = KeyPair::from_pem(&secret).with_context(|| format!("{CA_KEY} holds no key"))?;
    Issuer::from_ca_cert_pem(&read(CA_CERT)?, secret)
        .with_context(|| format!("{CA_CERT} is not the certificate of a CA"))
}

fn lasting(mut params: CertificateParams, days: u16) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BEFORE;
    params.not_after = now + Duration::days(days.into());
    params
}

fn named(name: &str) -> DistinguishedName {
    let mut named = DistinguishedName::new();
    named.push(DnType::CommonName, name);
    named
}

/// Whole or not at all: who follows the file never sees half of it.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let unwritable = || format!("cannot write {}", path.display());
    let new = path.with_added_extension("new");
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(mode);
    let mut file: File = options.open(&new).with_context(unwritable)?;
    file.write_all(text.as_bytes()).with_context(unwritable)?;
    file.sync_all().with_context(unwritable)?;
    fs::rename(&new, path).with_context(unwritable)
}

fn show(file: &Path) -> Result<()> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let found = Certificate::from_pem(&bytes);
    let found = found.map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
    found.iter().try_for_each(|certificate| crate::print(described(certificate)))
}

fn described(certificate: &Certificate) -> String {
    let Certificate { subject, issuer, names, is_ca, not_before, not_after, .. } = certificate;
    let names = match (names.is_empty(), is_ca) {
        (true, true) => "none: it is a CA".to_owned(),
        (true, false) => "none".to_owned(),
        (false, _) => names.join(", "),
    };
    let days = certificate.seconds_left().div_euclid(24 * 3600);
    let left = if days < 0 { "expired".to_owned() } else { format!("{days} days left") };
    format!(
        "subject     {subject}\nissuer      {issuer}\nnames       {names}\n\
         not before  {not_before}\nnot after   {not_after} ({left})"
    )
}
