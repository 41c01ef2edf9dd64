-- A store of schema 1, as the last version that wrote it made it; by sqlite3's iterdump.
PRAGMA user_version=1;
BEGIN TRANSACTION;
CREATE TABLE boot (
    id INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    boot TEXT NOT NULL,
    highest INTEGER NOT NULL DEFAULT 0,     -- the highest sequence number seen
    superseded INTEGER NOT NULL DEFAULT 0,  -- a newer boot was born
    UNIQUE (device_id, boot)
);
INSERT INTO "boot" VALUES(1,1,'b1',10,0);
INSERT INTO "boot" VALUES(2,2,'x',43,0);
CREATE TABLE device (
    id INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    boot_id INTEGER,                        -- the newest boot, known by its birth
    status TEXT NOT NULL DEFAULT 'unknown',
    state TEXT,                             -- JSON of the last birth of that boot
    first_seen REAL NOT NULL,
    last_seen REAL NOT NULL,
    latest TEXT NOT NULL DEFAULT '{}',      -- values of the newest telemetry, so that the fleet page reads one table
    latest_time REAL,
    recent TEXT NOT NULL DEFAULT '[]',
    received INTEGER NOT NULL DEFAULT 0,
    duplicates INTEGER NOT NULL DEFAULT 0,
    UNIQUE (site, device)
);
INSERT INTO "device" VALUES(1,'greenhouse','cam-1',1,'online','{"agent_version":null,"board":null,"boot":"b1","delegate":"","forbidden_modules":[],"labels":["healthy","blight"],"learned_version":0,"model":{"backbone":"abababababababababababababababababababababababababababababababab","name":"vit","precision":"int8","release":3,"version":"1.2.0"},"runtime":"","schema":1,"slot":null,"status":"online","time":null}',90.0,135.0,'{"class/0":3.0,"class/1":1.0,"drift":0.9,"frames":4.0,"latency/p50":0.09,"latency/p99":0.5}',3670.0,'[0.01, 0.02, 0.05, 0.09]',7,1);
INSERT INTO "device" VALUES(2,'greenhouse','cam-2',NULL,'unknown',NULL,130.0,132.0,'{"frames":2.0}',30.0,'[]',3,0);
CREATE TABLE gap (
    id INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    boot_id INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    missing INTEGER NOT NULL,
    watched INTEGER NOT NULL,
    opened REAL NOT NULL,
    closed REAL
);
INSERT INTO "gap" VALUES(1,1,1,3,4,2,1,105.0,NULL);
INSERT INTO "gap" VALUES(2,1,1,6,8,1,1,109.0,NULL);
INSERT INTO "gap" VALUES(3,2,2,1,39,39,0,130.0,NULL);
INSERT INTO "gap" VALUES(4,2,2,41,42,1,1,131.0,NULL);
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    device_id INTEGER NOT NULL,
    boot_id INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    kind TEXT NOT NULL,                     -- telemetry, or the kind of event
    time REAL NOT NULL,                     -- the device's clock
    received REAL NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (boot_id, sequence)
);
INSERT INTO "message" VALUES(1,1,1,1,'telemetry',3590.0,101.0,'{"class/0":3.0,"class/1":1.0,"drift":0.1,"frames":4.0,"latency/p50":0.01,"latency/p99":0.5}');
INSERT INTO "message" VALUES(2,1,1,2,'telemetry',3600.0,102.0,'{"class/0":3.0,"class/1":1.0,"drift":0.2,"frames":4.0,"latency/p50":0.02,"latency/p99":0.5}');
INSERT INTO "message" VALUES(3,1,1,5,'telemetry',3630.0,105.0,'{"class/0":3.0,"class/1":1.0,"drift":0.5,"frames":4.0,"latency/p50":0.05,"latency/p99":0.5}');
INSERT INTO "message" VALUES(4,1,1,9,'telemetry',3670.0,109.0,'{"class/0":3.0,"class/1":1.0,"drift":0.9,"frames":4.0,"latency/p50":0.09,"latency/p99":0.5}');
INSERT INTO "message" VALUES(5,1,1,7,'telemetry',3650.0,107.0,'{"class/0":3.0,"class/1":1.0,"drift":0.7000000000000001,"frames":4.0,"latency/p50":0.07,"latency/p99":0.5}');
INSERT INTO "message" VALUES(6,1,1,8,'telemetry',3660.0,108.0,'{"class/0":3.0,"class/1":1.0,"drift":0.8,"frames":4.0,"latency/p50":0.08,"latency/p99":0.5}');
INSERT INTO "message" VALUES(7,1,1,10,'drift',3700.0,120.0,'{"why":"test"}');
INSERT INTO "message" VALUES(8,2,2,40,'telemetry',10.0,130.0,'{"frames":2.0}');
INSERT INTO "message" VALUES(9,2,2,43,'telemetry',20.0,131.0,'{"frames":2.0}');
INSERT INTO "message" VALUES(10,2,2,42,'telemetry',30.0,132.0,'{"frames":2.0}');
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "meta" VALUES('identity','96c5704823a34ba89f12bce01042a486');
CREATE TABLE quarantine (
    id INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    topic TEXT NOT NULL,
    digest TEXT NOT NULL,
    reason TEXT NOT NULL,
    payload BLOB NOT NULL,                  -- its beginning
    payload_bytes INTEGER NOT NULL,
    seen INTEGER NOT NULL,
    first_seen REAL NOT NULL,
    last_seen REAL NOT NULL,
    UNIQUE (topic, digest)
);
INSERT INTO "quarantine" VALUES(1,'greenhouse','cam-1','a/b','ea5dbf9596d187e9500f23e9a680109475341cf4e81f7e043f7d97152c10772f','not JSON',X'FF00',2,1,136.0,136.0);
INSERT INTO "quarantine" VALUES(2,'','','?','e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855','no topic',X'',0,1,137.0,137.0);
CREATE TABLE quarantine_count (site TEXT NOT NULL, device TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (site, device));
INSERT INTO "quarantine_count" VALUES('greenhouse','cam-1',1);
INSERT INTO "quarantine_count" VALUES('','',1);
CREATE TABLE reply (device_id INTEGER NOT NULL, command TEXT NOT NULL, received REAL NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (device_id, command));
INSERT INTO "reply" VALUES(1,'c',133.0,'{"error":null,"id":"c\u0000 1","ok":true,"result":{},"schema":1}');
INSERT INTO "reply" VALUES(1,'c2',134.0,'{"error":"no","id":"c2","ok":false,"result":{},"schema":1}');
CREATE TABLE result (id INTEGER PRIMARY KEY, device_id INTEGER NOT NULL, received REAL NOT NULL, body TEXT NOT NULL);
INSERT INTO "result" VALUES(1,1,135.0,'{"confidence":0.5,"frame_id":"f","label":"healthy","schema":1,"time":1.0}');
CREATE INDEX telemetry_by_time ON message (device_id, time) WHERE kind = 'telemetry';
CREATE INDEX event_by_time ON message (device_id, time) WHERE kind != 'telemetry';
CREATE INDEX gap_by_boot ON gap (boot_id, first);
CREATE INDEX gap_by_device ON gap (device_id, id);
CREATE INDEX result_by_device ON result (device_id, id);
COMMIT;
