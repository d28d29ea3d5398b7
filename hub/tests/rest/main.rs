//! The REST interface against real files, chains, sockets and agents, in one process. What the programs add is tested
//! beside this, in `programs`.

mod backups;
mod external;
mod fixture;
mod refusals;
mod restart;
